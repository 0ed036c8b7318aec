// The skinny products of the lowrank engine compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA baseline
#include "lowrank/cpu_table.h"
