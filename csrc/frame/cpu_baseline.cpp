// The heavy stages of the frame engine compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA baseline
#include "frame/cpu_table.h"
