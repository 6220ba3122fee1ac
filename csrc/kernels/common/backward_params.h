// The parameters of a backward launch. Strides are in elements.
#pragma once

#include "kernels/common/params.h"

namespace flash_attn {

// Sums of dQ in float32, tile by tile of query rows, in the order in which a thread block's lanes hold them: a lane
// adds, and later reads, beside its neighbours.
struct DqSums {
  float* ptr;
  // Tiles of one head of one batch entry, or of one head of a whole variable-length batch (varlen_tiles.h).
  int tiles_per_head;
};

// Deterministic sums of dQ: by a counter for each tile, thread blocks add to it in the order of their keys. Null: they
// add in any order. Where cu_seqlens decrease, a turn may be nobody's, or that of two: `are_lost` is then set, and
// nobody waits.
struct TurnParams {
  int* counters;
  int* are_lost;
};

// What belongs to each of the forward's rows: float32, (batch, head, row) or, of a variable-length batch, (head, row),
// all with these strides.
struct RowStatistics {
  const float* lse;
  const float* dlse;  // null where LSE has no gradient
  // What the main kernel reads of them:
  float* lse_log2;  // log2 of the sum of exponentials; +inf for a row that saw no key, whose P is then 0
  float* delta;     // sum of dO * O, less the gradient of LSE
  int64_t batch_stride;
  int64_t head_stride;
};

struct BackwardParams {
  Operand q;
  Operand k;
  Operand v;
  Operand o;
  Operand dout;
  Operand dq;
  Operand dk;
  Operand dv;
  RowStatistics rows;
  DqSums dq_sums;
  TurnParams turns;
  HeadParams heads;
  SeqParams seq;
  int key_tiles_per_head;
  WindowParams window;
  ScoreParams score;
  float grad_scale;  // softmax_scale as the caller gave it
  DropoutParams dropout;
  SinkParams sink;
  float* ds_aux;  // (head)
};

}  // namespace flash_attn
