"""The training task in PyTorch: the network, the arguments and the reports of `helpers.trainer.task`.

    python -m helpers.trainer.task_torch --dataset diamonds --epochs 20 --model_dir model

It does without TensorFlow, which Google's PyTorch images do not have. Workers of a job share each batch. Killed at any
moment and started again, it ends with the same model, which `python -m helpers.predictor.pytorch` serves.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from helpers import data, regression
from helpers.trainer import files, loop, task


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train, save, and return "rmse" and "val_rmse" of each epoch, in the target's unit."""
    asked = task.parse(arguments, "task_torch")
    addresses, rank = loop.workers()
    workers = max(1, len(addresses))
    if workers > 1:
        torch.distributed.init_process_group(init_method=f"tcp://{addresses[0]}", world_size=workers, rank=rank)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # The rows, and the network that learns from them.
    train, validation = task.read(asked)
    features = data.Features(asked.dataset, train)
    x, y = (torch.from_numpy(array).to(device) for array in features.arrays(train))
    weights = loop.weights(features.width, (asked.units, asked.units, 1), asked.seed)
    network = Network(weights, asked.activation, *features.target_scale).to(device)
    optimizer = torch.optim.Adam(network.parameters(), asked.learning_rate, eps=1e-7)

    # Epoch after epoch, from where a killed task was.
    checkpoint = Checkpoint(asked.checkpoint_dir, network, optimizer, task.settings(asked), rank)
    run = epoch(network, optimizer, x, y, asked.batch_size, asked.seed, workers, rank)
    x_validation, y_validation = features.arrays(validation)

    def predict(inputs):
        with torch.inference_mode():
            return network(torch.from_numpy(inputs).to(device)).cpu()

    def validate():
        return regression.rmse(predict, x_validation, y_validation)

    history = task.train_epochs(asked, features.dataset.unit, checkpoint, run, validate, rank)
    task.save(asked, rank, lambda folder: export(network.cpu(), features, train, folder))
    if workers > 1:
        torch.distributed.destroy_process_group()
    return history


class Network(torch.nn.Module):
    """The network: dense layers, and the way back to the target's unit. It predicts a column, shape (rows, 1)."""

    def __init__(
        self, weights: Sequence[tuple[np.ndarray, np.ndarray]], activation: str, mean: float, deviation: float
    ):
        """Make a layer for each kernel and bias; `activation` is a function of torch.nn.functional, by name."""
        super().__init__()
        self.activation = getattr(torch.nn.functional, activation, None)
        if self.activation is None:
            where = "torch.nn.functional; expected relu, tanh or another of its names"
            raise ValueError(f"there is no --activation {activation} in {where}")
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*kernel.shape) for kernel, _ in weights)
        with torch.no_grad():
            for layer, (kernel, bias) in zip(self.layers, weights, strict=True):
                layer.weight.copy_(torch.from_numpy(kernel.T))
                layer.bias.copy_(torch.from_numpy(bias))
        self.mean, self.deviation = mean, deviation

    def forward(self, inputs):
        """Predict from encoded rows."""
        for layer in self.layers[:-1]:
            inputs = self.activation(layer(inputs))
        return self.layers[-1](inputs) * self.deviation + self.mean


class RawNetwork(torch.nn.Module):
    """A network with its preprocessing in front: it reads numbers as they are, and texts by their places in lists."""

    def __init__(self, network: Network, features: data.Features):
        """Join a network and what its features learnt."""
        super().__init__()
        self.network = network
        means, deviations = map(torch.tensor, zip(*features.scale.values(), strict=True))
        self.register_buffer("means", means)
        self.register_buffer("deviations", deviations)
        self.sizes = [len(values) for values in features.vocabulary.values()]

    def forward(self, numbers, places):
        """Predict from rows of numbers, float32, and of places, int64."""
        hot = [torch.eye(size)[places[:, column]] for column, size in enumerate(self.sizes)]
        return self.network(torch.cat([(numbers - self.means) / self.deviations, *hot], 1))


def epoch(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    batch_size: int,
    seed: int,
    workers: int = 1,
    rank: int = 0,
) -> Callable[[int], float]:
    """Return a function that trains for one epoch, given its number, and returns the training RMSE.

    Its order of rows depends on the seed and its number alone. `batch_size` rows make one update, whoever computes it.
    """

    def add_up(tensor):
        if workers > 1:
            torch.distributed.all_reduce(tensor)

    def run(number):
        total = torch.zeros((), device=x.device)
        for rows in torch.from_numpy(regression.order(len(x), number, seed)).to(x.device).split(batch_size):
            mine = rows[rank::workers]
            squares = (network(x[mine])[:, 0] - y[mine]).square().sum()
            optimizer.zero_grad()
            # The mean over the whole batch: what the workers find is added up.
            (squares / len(rows)).backward()
            for parameter in network.parameters():
                add_up(parameter.grad)
            optimizer.step()
            total += squares.detach()
        add_up(total)
        return float((total / len(x)).sqrt())

    return run


def export(network: Network, features: data.Features, train, folder: str) -> None:
    """Write a program of PyTorch's for raw rows, `model.pt2`, and the OpenAPI schema of such a row."""
    rows = {0: torch.export.Dim("rows")}
    example = torch.zeros(2, len(features.scale)), torch.zeros(2, len(features.vocabulary), dtype=torch.int64)
    program = torch.export.export(RawNetwork(network, features), example, dynamic_shapes=(rows, rows))
    content = io.BytesIO()
    torch.export.save(program, content)
    files.write(f"{folder.rstrip('/')}/model.pt2", content.getvalue())
    task.describe(features, train, folder)


class Checkpoint:
    """One file in a folder, gs:// or not: all that a training needs to go on exactly as if nothing had happened."""

    def __init__(self, folder: str | None, network, optimizer, settings: Mapping, rank: int):
        """Keep a network and its optimizer in a folder, if there is one; a file from other settings is refused.

        All workers read it, and number 0 writes it.
        """
        self.file = folder and f"{folder.rstrip('/')}/checkpoint.pt"
        self.parts = {"network": network, "optimizer": optimizer}
        self.settings, self.rank = settings, rank

    def restore(self) -> list[dict]:
        """Set the parts to what the file holds, and return the history that it holds; [] if there is none."""
        content = self.file and files.read(self.file)
        if not content:
            return []
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        loop.check(self.settings, saved["settings"], self.file)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["history"]

    def save(self, history: list[dict]) -> None:
        """Write the file anew."""
        if not self.file or self.rank:
            return
        content = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"settings": self.settings, "history": history, **states}, content)
        files.write(self.file, content.getvalue())


if __name__ == "__main__":
    main()
