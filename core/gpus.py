"""GPUs that a job can be planned for, as their makers describe them. Data; nothing here looks at a machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import JobError, Problem
from .suggest import nearest

_GIB = 2**30
_TORCHS = 0.965  # of the memory that a driver tells of, what torch reports at least


@dataclass(frozen=True)
class Gpu:
    """One accelerator and what connects it.

    Attributes:
        name: as ``--gpu`` takes it.
        memory: bytes that torch reports of it, which is less than its name says.
        half: dense 16-bit floating-point operations a second at best.
        full: the same in float32, which torch does not round to TF32 unless it is told to.
        bandwidth: bytes a second from and to its memory.
        link: bytes a second to the other GPUs of a node, in one direction.
        network: bytes a second to other nodes, in one direction: its share of what machines with it usually have.
        generation: compute capability; from 8.0 on there are bfloat16 and FlashAttention.
    """

    name: str
    memory: int
    half: float
    full: float
    bandwidth: float
    link: float
    network: float
    generation: float

    @property
    def is_cpu(self) -> bool:
        return self.generation == 0


def _gpu(
    name: str,
    gib: float,
    half: float,
    full: float,
    bandwidth: float,
    link: float,
    network: float,
    generation: float,
) -> Gpu:
    """GiB, TFLOP/s, TFLOP/s, GB/s, GB/s, Gbit/s."""
    sizes = half * 1e12, full * 1e12, bandwidth * 1e9, link * 1e9, network * 1e9 / 8
    return Gpu(name, int(gib * _GIB), *sizes, generation)


#: By name. Rates are those of NVIDIA's data sheets (dense, without sparsity): "NVIDIA H100 Tensor Core GPU" (2023),
#: "H200" (2023), "HGX B200" (2024), "A100" (2021), "L40S" (2023), "L4" (2023), "A10" and AWS's "EC2 G5" for the A10G,
#: "V100" (2020), "T4" (2019), "GeForce RTX 4090" with the Ada whitepaper (2022). Links: NVLink, one direction; or PCIe.
#: Network for each GPU: DGX H100, H200 and B200 have 8 x 400 Gbit/s, DGX A100 8 x 200; AWS's p4d (A100-40GB) 400 and
#: p3dn, g5, g6 100 for 8 GPUs, which is what the smaller ones are given here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200-180GB", 178.3, 2250, 75, 7700, 900, 400, 10.0),
        _gpu("H200-141GB", 139.8, 989, 67, 4800, 450, 400, 9.0),
        _gpu("H100-80GB", 79.1, 989, 67, 3350, 450, 400, 9.0),
        _gpu("H100-PCIe-80GB", 79.1, 756, 51, 2000, 64, 100, 9.0),
        _gpu("A100-80GB", 79.1, 312, 19.5, 2039, 300, 200, 8.0),
        _gpu("A100-40GB", 39.4, 312, 19.5, 1555, 300, 50, 8.0),
        _gpu("L40S-48GB", 44.3, 362, 91.6, 864, 32, 50, 8.9),
        _gpu("RTX-4090-24GB", 23.6, 165, 82.6, 1008, 32, 25, 8.9),
        _gpu("L4-24GB", 21.9, 121, 30.3, 300, 32, 12.5, 8.9),
        _gpu("A10G-24GB", 22.0, 70, 35, 600, 32, 12.5, 8.6),
        _gpu("V100-32GB", 31.7, 125, 15.7, 900, 150, 12.5, 7.0),
        _gpu("V100-16GB", 15.7, 125, 15.7, 900, 150, 12.5, 7.0),
        _gpu("T4-16GB", 14.5, 65, 8.1, 320, 16, 12.5, 7.5),
    )
}

_CPU = re.compile(r"cpu-(\d+(?:\.\d+)?)GB", re.IGNORECASE)


def find_gpu(name: str, *, cores: int = 1) -> Gpu:
    """The GPU of that name; ``cpu-24GB`` is a rank on ``cores`` cores of a machine with so much memory.

    A name may leave out the memory where that leaves one GPU only.

    Raises:
        JobError: there is none of that name.
    """
    match = _CPU.fullmatch(name)
    if match is not None:
        return cpu(int(float(match[1]) * 1e9), cores)
    plain = name.lower()
    exact = [gpu for gpu in GPUS.values() if gpu.name.lower() == plain]
    found = exact or [gpu for gpu in GPUS.values() if gpu.name.lower().rpartition("-")[0] == plain]
    if len(found) == 1:
        return found[0]
    known = f"known: {', '.join(GPUS)}, and cpu-24GB for 24 GB of memory without a GPU"
    near = nearest(name, GPUS)
    hint = (
        f"did you mean {' or '.join(gpu.name for gpu in found)}?" if found else f"did you mean {near}?" if near else ""
    )
    raise JobError(Problem(f"'{name}' is no GPU of the table", "--gpu", "\n".join(filter(None, [hint, known]))))


def cpu(memory: int, cores: int) -> Gpu:
    """A rank without a GPU: ``memory`` bytes, ``cores`` of a server's cores. A rough guess at what they do."""
    speed = 30e9 * cores  # of one core, in float32, as torch gets out of it
    return Gpu(f"cpu-{memory / 1e9:.0f}GB", memory, speed, speed, 10e9, 2e9, 1.25e9, 0)


def recognise(name: str, memory: int) -> Gpu:
    """The GPU of the table that a driver calls ``name`` and says to have ``memory`` bytes.

    One that the table does not have is given the rates of the one whose memory is nearest.
    """
    said = set(re.split(r"[^a-z0-9]+", name.lower()))
    words = {gpu: set(gpu.name.lower().split("-")[:-1]) for gpu in GPUS.values()}
    alike = [gpu for gpu in words if words[gpu] <= said]
    if not alike:
        nearest_gpu = min(GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
        return replace(nearest_gpu, memory=int(memory * _TORCHS))
    return min(alike, key=lambda gpu: (-len(words[gpu]), abs(gpu.memory - memory)))
