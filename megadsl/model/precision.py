"""The precision of a model, one rule for training, inference and measurements: every floating-point parameter has the dtype of
training.precision, and so has the hidden state.

Megatron-core makes its linear layers so (params_dtype), torch's norms and embedding tables stay in fp32 unless somebody casts
them. A CPU computes a norm of a bf16 hidden state with fp32 weights; CUDA's layer_norm refuses. What needs more than 16 bits
widens where it is computed: residual additions (residual.py), losses (loss.py), moments (monitor/probes.py), and the fp32
master weights that the optimizer steps. Buffers are made in the dtype in which they are read.
"""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_precision(model: torch.nn.Module, precision: str) -> None:
    """Cast the parameters of `model` in place to `precision`, a key of DTYPES. Call it before weights are filled in.

    DeepSpeed casts the same parameters to the same dtype when it takes a model over, and leaves buffers alone as this does.
    """
    dtype = DTYPES[precision]
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
