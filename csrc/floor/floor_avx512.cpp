// The floor kernels compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA avx512
#include "floor/floor_table.h"
