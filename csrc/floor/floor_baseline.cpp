// The floor kernels compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA baseline
#include "floor/floor_table.h"
