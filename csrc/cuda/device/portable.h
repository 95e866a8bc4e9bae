// What every architecture from sm_80 on has.
#pragma once

#include "memory.h"
#include "mma.h"
#include "thread.h"
#include "types.h"
