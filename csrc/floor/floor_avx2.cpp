// The floor kernels compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA avx2
#include "floor/floor_table.h"
