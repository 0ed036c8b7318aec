// The skinny products of the lowrank engine compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA avx512
#include "lowrank/cpu_table.h"
