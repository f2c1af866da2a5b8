// The CPU kernels for any processor.
#include "kernels.h"
