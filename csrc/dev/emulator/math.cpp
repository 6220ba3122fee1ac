// Functions of the C library where a GPU's differ in what is seen. The module's own come first when it is linked.
#include <cmath>

extern "C" {

// PTX: +0 is more than -0, whichever comes first, so that lanes that reduce in different orders agree.
float fmaxf(float a, float b) {
  if (std::isnan(a) || (a == b && std::signbit(a))) return b;
  return std::isnan(b) || a >= b ? a : b;
}
float fminf(float a, float b) {
  if (std::isnan(a) || (a == b && std::signbit(b))) return b;
  return std::isnan(b) || a <= b ? a : b;
}

}  // extern "C"
