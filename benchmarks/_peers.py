"""What users of PyTorch run: the same networks, sampled by a plain loop and by IBM's toolbox, or attacked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from torch import nn  # pyrefly: ignore[missing-import]

from robustjax.typing import ModelState


class Cnn(nn.Module):
    """The network of ``robustjax.models.cnn`` for 28x28x1 images, with the weights of ``state``.

    Args:
      state: of the model; its normalisation must be the identity.
      memory_format: in which the convolutions compute.
    """

    def __init__(self, state: ModelState, memory_format: torch.memory_format = torch.contiguous_format):
        super().__init__()
        self.channels_last = memory_format == torch.channels_last
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.dense, self.head = nn.Linear(7 * 7 * 64, 128), nn.Linear(128, 10)
        body = state.params["body"]
        layers = {"conv1": body["conv1"], "conv2": body["conv2"], "dense": body["dense"], "head": state.params["head"]}
        for name, weights in layers.items():
            kernel = np.asarray(weights["kernel"])
            if kernel.ndim == 4:
                kernel = kernel.transpose(3, 2, 0, 1)
            elif name == "dense" and not self.channels_last:  # features come in another order
                kernel = kernel.reshape(7, 7, 64, 128).transpose(3, 2, 0, 1).reshape(128, -1)
            else:
                kernel = kernel.T
            layer = getattr(self, name)
            layer.weight.data = torch.tensor(kernel).contiguous()
            layer.bias.data = torch.tensor(np.asarray(weights["bias"]))
        self.to(memory_format=memory_format)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 1, 28, 28)``."""
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x), 2).relu_()
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)  # a view, where flattening channel by channel would copy
        return self.head(self.dense(x.flatten(1)).relu_())


class Mlp(nn.Sequential):
    """The network of ``robustjax.models.mlp`` for images of one channel, with the weights of ``state``.

    Args:
      state: of the model; its normalisation must be the identity.
    """

    def __init__(self, state: ModelState):
        hidden = state.params["body"]["dense"]
        layers: list[nn.Module] = [nn.Flatten()]
        for weights in (*(hidden[name] for name in sorted(hidden, key=int)), state.params["head"]):
            kernel, bias = (torch.tensor(np.asarray(weights[name])) for name in ("kernel", "bias"))
            layer = nn.Linear(*kernel.shape)
            layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
            layers += [layer, nn.ReLU()]
        super().__init__(*layers[:-1])
        self.eval()


@torch.inference_mode()
def logits(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """Logits of images ``(batch, height, width, channels)``."""
    return model(torch.tensor(x).permute(0, 3, 1, 2)).numpy()


@torch.inference_mode()
def sample_counts(model: Cnn, x: np.ndarray, *, sigma: float, num_samples: int, batch_size: int) -> np.ndarray:
    """Votes under Gaussian noise around one image ``(height, width, channels)``, by the usual loop."""
    image = torch.tensor(x).permute(2, 0, 1)
    counts = torch.zeros(10, dtype=torch.int64)
    for start in range(0, num_samples, batch_size):
        noisy = torch.randn(min(batch_size, num_samples - start), *image.shape).mul_(sigma).add_(image)
        counts += torch.bincount(model(noisy).argmax(1), minlength=10)
    return counts.numpy()


def art_certify(
    model: Cnn, x: np.ndarray, *, sigma: float, alpha: float, num_selection: int, num_estimation: int, batch_size: int
) -> Callable[[], int]:
    """Certification of one image ``(height, width, channels)`` by IBM's toolbox; the call returns its label."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing  # pyrefly: ignore

    classifier = PyTorchRandomizedSmoothing(
        model,
        nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        device_type="cpu",
        sample_size=num_selection,
        scale=sigma,
        alpha=alpha,
    )
    images = np.ascontiguousarray(x.transpose(2, 0, 1)[None])
    return lambda: int(classifier.certify(images, n=num_estimation, batch_size=batch_size)[0][0])


Attack = Callable[[], np.ndarray]
"""Returns adversarial images ``(batch, height, width, channels)``."""


def pgd(model: nn.Module, x: np.ndarray, labels: np.ndarray, *, epsilon: float, steps: int) -> Attack:
    """PGD of torchattacks in an linf ball, with the step size of robustjax."""
    import torchattacks  # pyrefly: ignore[missing-import]

    attack = torchattacks.PGD(model, eps=epsilon, alpha=2.5 * epsilon / steps, steps=steps)
    return _on_host(attack, x, labels)


def autoattack(model: nn.Module, x: np.ndarray, labels: np.ndarray, *, epsilon: float) -> Attack:
    """The authors' standard AutoAttack in an linf ball."""
    from autoattack import AutoAttack  # pyrefly: ignore[missing-import]

    attack = AutoAttack(model, norm="Linf", eps=epsilon, verbose=False, device="cpu")
    return _on_host(attack.run_standard_evaluation, x, labels)


def _on_host(attack: Callable, x: np.ndarray, labels: np.ndarray) -> Attack:
    images, classes = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels).long()
    return lambda: attack(images, classes).permute(0, 2, 3, 1).numpy()
