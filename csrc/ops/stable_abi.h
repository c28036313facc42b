// The oldest torch that the operations load in: 2.10, written as in torch/headeronly/version.h. Include this before any
// torch header, which then declares nothing newer.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000
