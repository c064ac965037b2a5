"""The model beside times that other projects published of their own kernels, compiled here from their installed packages.

  TRL 1.16    log-probabilities and entropies in one pass; its authors timed the version of some weeks before
  Liger 0.8.5 total variation, cross-entropy with its gradient, KL; timed for the version named in each row
Memory's speed is that of a copy on the same kind of GPU, 90 % of the pins' (pipes.py). One latency for all, 600 ns: idle memory
answers in about 480 cycles (arXiv:2402.13499), and these kernels keep it busy.

Not here: our kernels (model.py), times of a GPU at hand (benchmarks/gpu).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.static import roofline
from benchmarks.static.pipes import DEVICES, H100, H100_PCIE, Device

LIGER = "https://github.com/linkedin/Liger-Kernel/blob/main/benchmark/data/all_benchmark_data.csv"
LIGER_2024 = (
    "https://github.com/linkedin/Liger-Kernel/blob/61594612d69a75a7a47e6a9398d4ef4f2b068188/benchmark/cross_entropy_speed/"
)
ON_H100 = LIGER_2024 + "nvidia_h100_80gb_hbm3/cross-entropy-fwd-speed-benchmark.csv"
ON_A100 = LIGER_2024 + "nvidia_a100-sxm4-80gb/cross-entropy-fwd-speed-benchmark.csv"
TRL = "https://github.com/huggingface/trl/issues/7244"
LATENCY_NS = 600.0


class Published(NamedTuple):
    kernel: str
    rows: int
    vocab: int
    dtype: torch.dtype
    device: Device
    reported_ms: float
    source: str
    launch: Callable[["Published"], None]
    streams: int = 1  # tensors that a loop reads
    target: str = "sm_90"

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape or (self.rows, self.vocab), dtype=self.dtype, device="meta")

    def index(self) -> torch.Tensor:
        return torch.empty(self.rows, dtype=torch.long, device="meta")

    @property
    def row_bytes(self) -> int:
        return self.streams * self.vocab * self.dtype.itemsize


def _trl(figure: Published) -> None:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    selective_log_softmax_and_entropy(figure.tensor(), figure.index())


def _tvd(figure: Published) -> None:
    from liger_kernel.ops.tvd import tv_distance_forward_triton

    tv_distance_forward_triton(figure.tensor(), figure.tensor(), None, "batchmean", -100, False)


def _kl(figure: Published) -> None:
    from liger_kernel.ops.kl_div import kldiv_forward_triton

    kldiv_forward_triton(figure.tensor(), figure.tensor(), False, "batchmean", 1e-10)


def _cross_entropy(figure: Published) -> None:
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    # The launcher looks at the targets' values, which shapes do not have.
    liger_cross_entropy_kernel[(figure.rows,)](
        X_ptr=figure.tensor(), X_stride=figure.vocab, Y_ptr=figure.index(), Y_stride=1, weight_ptr=None,
        loss_ptr=figure.tensor(figure.rows), z_loss_ptr=None, loss_stride=1, token_accuracy_ptr=None, token_accuracy_stride=0,
        predicted_tokens_ptr=None, predicted_tokens_stride=0, n_cols=figure.vocab, n_non_ignore=figure.rows,
        sum_non_ignore_weight=figure.rows, ignore_index=-100, weight_sum=0.0, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, figure.vocab), HAS_WEIGHT=False, HAS_SOFTCAPPING=False, HAS_GRADIENTS=True, num_warps=32,
    )  # fmt: skip


FP32, BF16 = torch.float32, torch.bfloat16
FIGURES = (
    Published("TRL, log-probabilities and entropies", 8192, 151_936, BF16, H100, 0.89, TRL, _trl),
    Published("Liger 0.7.0, total variation", 16_384, 8192, FP32, H100, 0.534, LIGER, _tvd, 2),
    Published("Liger 0.7.0, total variation", 16_384, 32_768, FP32, H100, 2.099, LIGER, _tvd, 2),
    Published("Liger 0.7.0, total variation", 16_384, 131_072, FP32, H100, 8.501, LIGER, _tvd, 2),
    Published("Liger of August 2024, cross-entropy", 16_384, 32_768, FP32, H100, 1.573, ON_H100, _cross_entropy),
    Published("Liger of August 2024, cross-entropy", 16_384, 65_536, FP32, H100, 3.952, ON_H100, _cross_entropy),
    Published("Liger of August 2024, cross-entropy", 16_384, 131_072, FP32, H100, 8.540, ON_H100, _cross_entropy),
    Published(
        "Liger of August 2024, cross-entropy",
        16_384,
        131_072,
        FP32,
        DEVICES["sm_80"],
        15.1,
        ON_A100,
        _cross_entropy,
        target="sm_80",
    ),
    Published("Liger 0.2.1, KL", 16_384, 16_384, FP32, H100_PCIE, 1.118, LIGER, _kl, 2),
    Published("Liger 0.2.1, KL", 16_384, 131_072, FP32, H100_PCIE, 8.698, LIGER, _kl, 2),
)


def launches() -> Iterator[tuple[Published, Any]]:
    for figure in FIGURES:
        with roofline.Recorder() as recorded:
            figure.launch(figure)
        yield figure, recorded[0]
