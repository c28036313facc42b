// The oldest torch that the operations load in: 2.10, written as torch/headeronly/version.h does. Include this before
// any header of torch, which then declares nothing newer.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000
