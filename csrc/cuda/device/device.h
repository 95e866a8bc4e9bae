// The whole vocabulary for sm_90a; kernels for sm_80 and later include portable.h.
#pragma once

#include "cluster.h"
#include "mbarrier.h"
#include "portable.h"
#include "tma.h"
#include "wgmma.h"
