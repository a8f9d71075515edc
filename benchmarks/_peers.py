"""What users of PyTorch run: the same networks, sampled by a plain loop and by IBM's toolbox, or attacked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from torch import nn  # pyrefly: ignore[missing-import]

from robustjax.typing import ModelState


class Cnn(nn.Module):
    """The network of ``robustjax.models.cnn``, or with ``padding`` 0 that of ``lenet``, with the weights of ``state``.

    Args:
      state: of the model; its normalisation must be the identity.
      memory_format: in which the convolutions compute.
      padding: of the convolutions, on every side.
    """

    def __init__(
        self, state: ModelState, memory_format: torch.memory_format = torch.contiguous_format, padding: int = 1
    ):
        super().__init__()
        self.channels_last = memory_format == torch.channels_last
        body = state.params["body"]
        layers = {"conv1": body["conv1"], "conv2": body["conv2"], "dense": body["dense"], "head": state.params["head"]}
        channels = layers["conv2"]["kernel"].shape[-1]
        for name, weights in layers.items():
            kernel = np.asarray(weights["kernel"])
            if kernel.ndim == 4:
                size, _, inputs, outputs = kernel.shape
                layer: Any = nn.Conv2d(inputs, outputs, size, padding=padding)
                kernel = kernel.transpose(3, 2, 0, 1)
            else:
                layer = nn.Linear(kernel.shape[0], kernel.shape[1])
                if name == "dense" and not self.channels_last:  # features come in another order
                    kernel = kernel.reshape(-1, channels, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)
                kernel = kernel.T
            layer.weight.data = torch.tensor(kernel).contiguous()
            layer.bias.data = torch.tensor(np.asarray(weights["bias"]))
            setattr(self, name, layer)
        self.to(memory_format=memory_format)  # pyrefly: ignore[no-matching-overload]
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 1, height, width)``."""
        layers: Any = self
        for conv in (layers.conv1, layers.conv2):
            x = nn.functional.max_pool2d(conv(x), 2).relu_()
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)  # a view, where flattening channel by channel would copy
        return layers.head(layers.dense(x.flatten(1)).relu_())


def _conv(kernel: np.ndarray, stride: int = 1) -> nn.Conv2d:
    size, _, inputs, outputs = kernel.shape
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    conv.weight.data = torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1)).contiguous()
    return conv


class _Block(nn.Module):
    def __init__(self, params: dict, stride: int):
        super().__init__()
        kernels = [params["convs"][name]["kernel"] for name in ("0", "1")]
        self.convs = nn.ModuleList([_conv(kernels[0], stride), _conv(kernels[1])])
        self.norms = nn.ModuleList([nn.BatchNorm2d(kernels[0].shape[-1]) for _ in range(2)])
        self.shortcut = nn.Identity()
        if "shortcut" in params:
            projection = _conv(params["shortcut"]["conv"]["kernel"], stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(kernels[0].shape[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](self.convs[0](x)).relu_()
        return (self.norms[1](self.convs[1](y)) + self.shortcut(x)).relu_()


class Resnet(nn.Module):
    """The network of ``robustjax.models.resnet20``, with the kernels of ``state`` and untrained normalisation.

    Args:
      state: of the model; its normalisation must be the identity.
      memory_format: in which the convolutions compute.
    """

    def __init__(self, state: ModelState, memory_format: torch.memory_format = torch.contiguous_format):
        super().__init__()
        body, head = state.params["body"], state.params["head"]
        blocks = [body["blocks"][name] for name in sorted(body["blocks"], key=int)]
        strides = [2 if "shortcut" in params else 1 for params in blocks]
        self.stem, self.norm = _conv(body["stem"]["kernel"]), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*map(_Block, blocks, strides))
        self.head = nn.Linear(*head["kernel"].shape)
        self.head.weight.data = torch.tensor(np.asarray(head["kernel"]).T).contiguous()
        self.head.bias.data = torch.tensor(np.asarray(head["bias"]))
        self.to(memory_format=memory_format)  # pyrefly: ignore[no-matching-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 3, 32, 32)``."""
        return self.head(self.blocks(self.norm(self.stem(x)).relu_()).mean((2, 3)))


NETWORKS = {"lenet": functools.partial(Cnn, padding=0), "cnn": Cnn, "resnet20": Resnet}
"""Networks that are trained, by the name of the model."""


def training_step(
    model: nn.Module,
    x: np.ndarray,
    labels: np.ndarray,
    memory_format: torch.memory_format,
    *,
    sigma: float,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Callable[[], float], float]:
    """A step of SGD on noisy images, which returns its loss, and the loss without noise before the first step."""
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    classes = torch.tensor(labels).long()
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum, weight_decay=weight_decay)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images + sigma * torch.randn_like(images)), classes)
        loss.backward()
        optimizer.step()
        return loss.item()

    with torch.no_grad():
        return step, nn.functional.cross_entropy(model(images), classes).item()


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
            layer = nn.Linear(kernel.shape[0], kernel.shape[1])
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
