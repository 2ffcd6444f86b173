#pragma once
#include "cuda_on_cpu/vector_types.h"
