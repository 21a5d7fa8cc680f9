"""How numbers are called in TensorBoard and Weights & Biases, and in which order they are seen. metrics.jsonl keeps names of its own.

TensorBoard sorts groups (what stands before the first slash) alphabetically and opens the first two: here `loss` and `profile`, the
curves and the pictures of the signal. Then come the other pictures, `signal` (measured over plan), throughput, training, weights.
"""

LOSS, VALIDATION_LOSS = "loss/train", "loss/validation"
PROFILE, PARTS, HISTORY = "profile", "profile_of_parts", "profile_over_time"  # pictures

# Name in metrics.jsonl -> the shown one. The parts of a loss and the task's metrics are shown under their own names.
SHOWN = {
    "train/loss": LOSS,
    "validation/loss": VALIDATION_LOSS,
    "train/lr": "training/learning_rate",
    "train/grad_norm": "training/gradient_norm",
    "train/max_attention_logit": "training/max_attention_logit",
    "train/skipped_iterations": "training/skipped_iterations",
    "throughput/tokens_per_second": "throughput/tokens_per_second",
    "throughput/tflops": "throughput/tflops_per_device",
    "throughput/mfu": "throughput/mfu",
    "throughput/padding_share": "throughput/padding_share",
    "throughput/seconds_per_iteration": "throughput/seconds_per_iteration",
    "memory/peak_gib": "throughput/peak_memory_gib",
}

# Page "Custom scalars": chapter -> chart -> its curves. Three curves with "Margin": one in the middle of a band.
LAYOUT = {
    "1 Does it learn": {
        "loss": ["Multiline", [LOSS, VALIDATION_LOSS]],
        "gradient norm": ["Multiline", ["training/gradient_norm"]],
        "learning rate": ["Multiline", ["training/learning_rate"]],
    },
    "2 Does the theory hold (measured over plan, 1 is as planned; band: all depths)": {
        "forward second moment": ["Margin", ["signal/forward_ratio_median", "signal/forward_ratio_min", "signal/forward_ratio_max"]],
        "gradient variance": ["Margin", ["signal/gradient_ratio_median", "signal/gradient_ratio_min", "signal/gradient_ratio_max"]],
        "token correlation, measured - plan": ["Multiline", ["signal/token_correlation_difference_max"]],
        "gradient variance, first over last": ["Multiline", ["signal/gradient_first_over_last"]],
    },
    "3 What goes wrong first": {
        "largest attention logit": ["Multiline", ["signal/attention_logit_max"]],
        "smallest attention entropy": ["Multiline", ["signal/attention_entropy_min"]],
        "smallest angular distance of a layer": ["Multiline", ["signal/angular_distance_min"]],
        "largest share of dead activations": ["Multiline", ["signal/dead_activations_max"]],
        "update over weight": ["Margin", ["weights/update_ratio_median", "weights/update_ratio_min", "weights/update_ratio_max"]],
    },
    "4 How fast": {
        "tokens per second": ["Multiline", ["throughput/tokens_per_second"]],
        "TFLOP/s a device": ["Multiline", ["throughput/tflops_per_device"]],
        "MFU": ["Multiline", ["throughput/mfu"]],
        "peak memory, GiB": ["Multiline", ["throughput/peak_memory_gib"]],
    },
}


def shown(name: str) -> str:
    """The name to show for one of metrics.jsonl."""
    if name in SHOWN:
        return SHOWN[name]
    return "loss/" + name.replace("/", "_") if name.startswith("train/") else name
