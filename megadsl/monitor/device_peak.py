"""What a device can do at most, for the model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311 appendix B): a run's FLOP/s over this.

Dense (not sparse) 16-bit matrix multiplications, from the makers' data sheets; where a sheet gives sparse numbers alone, half of them.
"""

# Part of the device's name -> TFLOP/s. The first that fits counts: what is longer stands before what it contains.
PEAK_TFLOPS = {
    "B300": 2250.0,  # Blackwell Ultra data sheet: 4.5 PFLOP/s sparse
    "B200": 2250.0,  # Blackwell data sheet: 4.5 PFLOP/s sparse
    "B100": 1750.0,  # Blackwell architecture brief: 3.5 PFLOP/s sparse
    "GH200": 989.0,  # Grace Hopper data sheet: 1979 sparse
    "H200 NVL": 835.5,  # H200 data sheet: 1671 sparse
    "H200": 989.0,  # H200 data sheet: 1979 sparse
    "H100 NVL": 835.5,  # H100 data sheet: 1671 sparse
    "H100 PCIe": 756.0,  # H100 data sheet: 1513 sparse
    "H100": 989.0,  # H100 SXM data sheet: 1979 sparse
    "H800": 989.0,  # as H100 SXM; its links are slower
    "A100": 312.0,  # A100 data sheet, PCIe and SXM
    "A800": 312.0,  # as A100; its links are slower
    "A40": 149.7,  # A40 data sheet
    "A30": 165.0,  # A30 data sheet
    "A10G": 70.0,  # AWS's variant of A10
    "L40S": 362.0,  # L40S data sheet: 733 sparse
    "L40": 181.0,  # L40 data sheet
    "L4": 121.0,  # L4 data sheet: 242 sparse
    "RTX 4090": 165.2,  # Ada architecture paper, with fp32 accumulation
    "RTX 3090": 71.0,  # Ampere GA102 architecture paper, with fp32 accumulation
    "MI300X": 1307.4,  # CDNA 3 data sheet
    "MI250X": 383.0,  # CDNA 2 data sheet
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak TFLOP/s of a device at 16 bits; None in fp32 and where the device is not in the table (a CPU)."""
    if precision == "fp32":
        return None
    # By whole words: "L4" is in "L40S" too, and the makers write "H100 80GB HBM3", "A100-SXM4-80GB", "H100 PCIe".
    words = device_name.replace("-", " ").split()
    return next((peak for part, peak in PEAK_TFLOPS.items() if _contains(words, part.split())), None)


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start:start + len(part)] == part for start in range(len(words) - len(part) + 1))
