"""A head on features: the loss of its rows, at several probe points in one product of matrices, and its features."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_dpzo.losses.sequence_classification import SequenceClassificationLoss
from hf_dpzo.models.feature_classifier import BIAS_WEIGHT, FeatureClassifier
from hf_dpzo.models.unwrap import Inputs, drop_labels, unwrap_model


class FeatureClassificationLoss(SequenceClassificationLoss):
    """The loss of a `FeatureClassifier`, on tokens or on features that were computed before.

    Args:
        model: the classifier. Its configuration says the number and the kind of the labels.
    """

    def at_points(self, model: torch.nn.Module, inputs: Inputs, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return one loss for each row at each probe point, float32 `[batch, points]`.

        The scores of all points are one product, `[batch, hidden_size] x [hidden_size, classes * points]`.

        Args:
            model: the classifier.
            inputs: the tokens or the features of rows, and their labels.
            parameters: the values of the head's parameters by their names, `[points, *shape]`.
        """
        features = inputs.get("features")
        if features is None:
            features = unwrap_model(model).compute_features(**drop_labels(inputs))
        head = unwrap_model(model).classifier
        points = len(next(iter(parameters.values())))
        weight = _find(parameters, "classifier.weight", head.weight, points)
        bias = _find(parameters, "classifier.bias", head.bias, points)
        if weight.shape[1] == 2 and self.find_problem_type(inputs["labels"]) == "single_label_classification":
            return self._losses_of_two(features, weight, bias, inputs["labels"])
        # Class by class, so that a row's scores of one class lie beside each other for all points.
        columns = weight.transpose(0, 1).reshape(-1, weight.shape[-1])
        offsets = BIAS_WEIGHT * bias.T.reshape(-1)
        scores = torch.addmm(offsets, features, columns.T).view(len(features), weight.shape[1], points)
        return self._losses_at_points(scores, inputs)

    @staticmethod
    def _losses_of_two(
        features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the cross-entropy of two classes, `[batch, points]`: only the difference of their scores counts."""
        labels = labels.reshape(len(features), 1)
        is_class = (labels == 0) | (labels == 1)
        signs = torch.where(is_class, 1.0 - 2.0 * labels, torch.nan)
        offsets = BIAS_WEIGHT * (bias[:, 1] - bias[:, 0])
        return F.softplus(_multiply_mirrored(features, weight[:, 1] - weight[:, 0]).add_(offsets).mul_(signs))

    def _losses_at_points(self, scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return the losses, `[batch, points]`, of the scores `[batch, classes, points]`."""
        rows, classes, points = scores.shape
        labels = inputs["labels"]
        if self.find_problem_type(labels) == "single_label_classification":
            labels = labels.reshape(rows)
            is_class = (labels >= 0) & (labels < classes)
            safe = torch.where(is_class, labels, 0).long()
            losses = F.cross_entropy(scores, safe[:, None].expand(-1, points), reduction="none")
            return losses.masked_fill(~is_class[:, None], torch.nan)
        repeated = labels.reshape(rows, -1).repeat_interleave(points, dim=0)
        flat = scores.transpose(1, 2).reshape(rows * points, classes)
        return self.losses(flat, {**inputs, "labels": repeated}).view(rows, points)


def _multiply_mirrored(features: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return `features @ columns.T`, `[batch, points]`, by half of the product where points lie in pairs around one.

    So the points of central differences do. Whether they do is public, because parameters are.
    """
    ahead, behind = columns[0::2], columns[1::2]
    if len(ahead) != len(behind):
        return features @ columns.T
    middles = (ahead + behind) / 2
    rounding = 4 * torch.finfo(columns.dtype).eps * columns.abs().max()
    if not (middles - middles[:1]).abs().max() <= rounding:
        return features @ columns.T
    product = features @ torch.cat([(ahead - behind) / 2, middles[:1]]).T
    moves, middle = product[:, :-1], product[:, -1:]
    return torch.stack([middle + moves, middle - moves], dim=2).flatten(1)


def _find(parameters: Mapping[str, torch.Tensor], name: str, own: torch.Tensor, points: int) -> torch.Tensor:
    """Return the values of the head's parameter `name` at all points; if it is not trained, its `own` ones."""
    found = (values for full_name, values in parameters.items() if full_name.endswith(name))
    return next(found, own.detach().expand(points, *own.shape))


@dataclass(frozen=True, kw_only=True)
class LabelForm:
    """What the label of each row is, by the types of a data set.

    Args:
        dtype: the type.
        shape: the shape, without that of the batch.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    @property
    def numbers(self) -> int:
        """The number of numbers in a label."""
        return torch.Size(self.shape).numel()


class FeatureReader:
    """Computes the features of rows in the place of their losses, and behind them the numbers of their labels.

    So that features are computed under the seal under which losses are.

    Args:
        form: what labels are. A row with any other one fails.
    """

    def __init__(self, form: LabelForm) -> None:
        self._form = form

    def __call__(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return features and labels, float32 `[batch, hidden_size + numbers]`."""
        labels = inputs["labels"]
        if labels.dtype != self._form.dtype or labels.shape[1:] != self._form.shape:
            raise ValueError(f"labels: they are {labels.dtype} {tuple(labels.shape[1:])}; give all rows one form.")
        features = unwrap_model(model).compute_features(**drop_labels(inputs))
        return torch.cat([features, labels.reshape(len(features), -1).to(features)], dim=1)

    def split(self, read: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the columns in what was read: features `[rows, hidden_size]`, and labels. NaN is no label's number."""
        width = read.shape[1] - self._form.numbers
        labels = read[:, width:].nan_to_num(-1.0).to(self._form.dtype)
        return {"features": read[:, :width].contiguous(), "labels": labels.reshape(-1, *self._form.shape)}


def reads_features(model: torch.nn.Module) -> bool:
    """Return whether all that is trained of `model` is a head on features, so that the features of a row never move."""
    return isinstance(model, FeatureClassifier) and not (model.center.requires_grad or model.scale.requires_grad)
