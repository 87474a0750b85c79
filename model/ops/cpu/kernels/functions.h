// The table of a unit's functions. A unit includes this file after choosing an instruction set.
#pragma once

#include "attention/attention.h"
#include "experts.h"
#include "gemm/compressed.h"
#include "gemm/int8/pack.h"
#include "gemm/linear.h"
#include "gemm/pack.h"
#include "latent.h"
#include "recurrent/causal_conv.h"
#include "recurrent/delta_rule.h"
#include "route.h"
#include "table.h"
#include "token_ops.h"

namespace {

const Function functions[] = {
    NATIVE_FUNCTION(gather),
    NATIVE_FUNCTION(embed),
    NATIVE_FUNCTION(scale),
    NATIVE_FUNCTION(rms_norm),
    NATIVE_FUNCTION(softcap),
    NATIVE_FUNCTION(argmax),
    NATIVE_FUNCTION(add_rms_norm),
    NATIVE_FUNCTION(scaled_sum),
    NATIVE_FUNCTION(gated),
    NATIVE_FUNCTION(rotate_and_write),
    NATIVE_FUNCTION(head_linear),
    NATIVE_FUNCTION(write_latents),
    NATIVE_FUNCTION(attention),
    NATIVE_FUNCTION(linear),
    NATIVE_FUNCTION(logits),
    NATIVE_FUNCTION(gated_linear),
    NATIVE_FUNCTION(route),
    NATIVE_FUNCTION(add_gated),
    NATIVE_FUNCTION(experts),
    NATIVE_FUNCTION(causal_conv),
    NATIVE_FUNCTION(delta_rule),
    NATIVE_FUNCTION(gated_norm),
    NATIVE_FUNCTION(output_gate),
    NATIVE_FUNCTION(pack),
    NATIVE_FUNCTION(pack_mxfp4),
    NATIVE_FUNCTION(pack_int8),
    NATIVE_FUNCTION(rotate),
    NATIVE_FUNCTION(quantize_weight),
#if BF16_DOT
    NATIVE_FUNCTION(choose_exponents),
    NATIVE_FUNCTION(compress),
#endif
};

}  // namespace

#define FUNCTION_COUNT (int64_t)(sizeof functions / sizeof functions[0])
