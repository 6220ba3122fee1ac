// Exposes the planner to pytest, for development only: the wheel does not hold this module.
#include <pybind11/pybind11.h>

#include "plan/backward_plan.h"
#include "plan/plan.h"
#include "variant/varlen_tiles.h"

namespace py = pybind11;
using namespace flash_attn;

PYBIND11_MODULE(flash_attn_plan, module) {
  py::enum_<Arch>(module, "Arch").value("SM80", Arch::kSm80).value("SM90", Arch::kSm90);
  py::enum_<Dtype>(module, "Dtype").value("FP16", Dtype::kFp16).value("BF16", Dtype::kBf16);
  py::enum_<Mask>(module, "Mask")
      .value("FULL", Mask::kFull)
      .value("CAUSAL", Mask::kCausal)
      .value("GENERAL", Mask::kGeneral);
  py::enum_<Score>(module, "Score").value("PLAIN", Score::kPlain).value("GENERAL", Score::kGeneral);
  py::enum_<Layout>(module, "Layout").value("DENSE", Layout::kDense).value("VARLEN", Layout::kVarlen);
  py::enum_<PackGqa>(module, "PackGqa")
      .value("AUTO", PackGqa::kAuto)
      .value("NEVER", PackGqa::kNever)
      .value("ALWAYS", PackGqa::kAlways);
  py::enum_<Rows>(module, "Rows").value("MANY", Rows::kMany).value("UP_TO_64", Rows::k64).value("UP_TO_16", Rows::k16);
  py::register_exception<UnsupportedProblem>(module, "UnsupportedProblem");

  py::class_<Problem>(module, "Problem")
      .def(py::init([] { return Problem{}; }))
      .def_readwrite("layout", &Problem::layout)
      .def_readwrite("layout_k", &Problem::layout_k)
      .def_readwrite("dtype", &Problem::dtype)
      .def_readwrite("batch", &Problem::batch)
      .def_readwrite("num_heads", &Problem::num_heads)
      .def_readwrite("num_heads_k", &Problem::num_heads_k)
      .def_readwrite("head_dim", &Problem::head_dim)
      .def_readwrite("head_dim_v", &Problem::head_dim_v)
      .def_readwrite("rows_q", &Problem::rows_q)
      .def_readwrite("rows_k", &Problem::rows_k)
      .def_readwrite("has_pages", &Problem::has_pages)
      .def_readwrite("pages_suit_tma", &Problem::pages_suit_tma)
      .def_readwrite("window_left", &Problem::window_left)
      .def_readwrite("window_right", &Problem::window_right)
      .def_readwrite("has_softcap", &Problem::has_softcap)
      .def_readwrite("has_alibi", &Problem::has_alibi)
      .def_readwrite("has_dropout", &Problem::has_dropout)
      .def_readwrite("num_splits", &Problem::num_splits)
      .def_readwrite("pack_gqa", &Problem::pack_gqa)
      .def_readwrite("allows_few_rows", &Problem::allows_few_rows);

  py::class_<Plan>(module, "Plan")
      .def_property_readonly("arch", [](const Plan& plan) { return plan.variant.arch; })
      .def_property_readonly("head_dim", [](const Plan& plan) { return plan.variant.head_dim.qk; })
      .def_property_readonly("head_dim_v", [](const Plan& plan) { return plan.variant.head_dim.v; })
      .def_property_readonly("dtype", [](const Plan& plan) { return plan.variant.dtype; })
      .def_property_readonly("mask", [](const Plan& plan) { return plan.variant.mask; })
      .def_property_readonly("score", [](const Plan& plan) { return plan.variant.score; })
      .def_property_readonly("tile_m", [](const Plan& plan) { return plan.tile.m; })
      .def_property_readonly("tile_n", [](const Plan& plan) { return plan.tile.n; })
      .def_readonly("tiles_per_head", &Plan::tiles_per_head)
      .def_readonly("num_blocks", &Plan::num_blocks)
      .def_property_readonly("rows", [](const Plan& plan) { return plan.variant.rows; })
      .def_property_readonly("packed_heads", [](const Plan& plan) { return plan.split.packed_heads; })
      .def_property_readonly("num_splits", [](const Plan& plan) { return plan.split.num_splits; })
      .def_property_readonly("num_slots", [](const Plan& plan) { return plan.split.num_slots; })
      .def_property_readonly("target_slots", [](const Plan& plan) { return plan.split.target_slots; })
      .def_property_readonly("min_tiles", [](const Plan& plan) { return plan.split.min_tiles; })
      .def_readonly("num_threads", &Plan::num_threads)
      .def_readonly("smem_bytes", &Plan::smem_bytes);

  py::class_<BackwardPlan>(module, "BackwardPlan")
      .def_property_readonly("head_dim", [](const BackwardPlan& plan) { return plan.variant.head_dim.qk; })
      .def_property_readonly("head_dim_v", [](const BackwardPlan& plan) { return plan.variant.head_dim.v; })
      .def_property_readonly("score", [](const BackwardPlan& plan) { return plan.variant.score; })
      .def_property_readonly("tile_m", [](const BackwardPlan& plan) { return plan.tile.m; })
      .def_property_readonly("tile_n", [](const BackwardPlan& plan) { return plan.tile.n; })
      .def_property_readonly("column_blocks", [](const BackwardPlan& plan) { return plan.tile.column_blocks; })
      .def_readonly("key_tiles_per_head", &BackwardPlan::key_tiles_per_head)
      .def_readonly("query_tiles_per_head", &BackwardPlan::query_tiles_per_head)
      .def_readonly("num_key_blocks", &BackwardPlan::num_key_blocks)
      .def_readonly("num_query_blocks", &BackwardPlan::num_query_blocks)
      .def_readonly("num_dq_sums", &BackwardPlan::num_dq_sums)
      .def_readonly("num_dq_counters", &BackwardPlan::num_dq_counters)
      .def_readonly("smem_bytes", &BackwardPlan::smem_bytes);

  module.def("make_backward_plan", &make_backward_plan);
  module.def("make_plan", [](const Problem& problem, Arch arch, int smem_limit, int num_sms) {
    return make_plan(problem, arch, {smem_limit, num_sms});
  });
  module.def("first_varlen_slot", &first_varlen_slot);
  module.def("num_varlen_slots", &num_varlen_slots);
  module.def("tile_rows", [](Arch arch, Rows rows) {
    py::list list;
    for (const TileRow& row : forward_tile_rows(arch, rows)) {
      list.append(
          py::make_tuple(row.head_dim.qk, row.head_dim.v, bytes_of(row.smem), row.tile.m, row.tile.n, row.reason));
    }
    return list;
  });
}
