// The loops of dynamic thresholding compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA avx2
#include "select/cpu_table.h"
