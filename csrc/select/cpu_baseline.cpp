// The loops of dynamic thresholding compiled for one instruction set (flags: see CMakeLists.txt).
#define MQ_ISA baseline
#include "select/cpu_table.h"
