// The loss on one tile of cells for one instruction set: QF_LEVEL and QF_BYTES, the width of its vectors, say which.
//
// No include guard, on purpose: efe_tiles.cpp includes this once for each set, inside a namespace of its own and under
// its own target pragma. A target attribute on the caller would not do: vector types wider than the baseline's are
// lowered to scalars before anything is inlined.
#include "math.inc.h"
//
#include "rows.inc.h"
//
#include "cells.inc.h"
//
#include "softmax.inc.h"
//
#include "backward.inc.h"
#include "forward.inc.h"

template <class T>
using Lanes = Simd<T, QF_BYTES>;

#undef QF_BYTES
#undef QF_LEVEL
