"""UCI Heart Disease (doi 10.24432/C52P4X): four real hospitals, rows and features as in FLamby's
benchmark. `scaling: public` measures from values known beforehand; `flamby` standardises by each
hospital's own records, without noise: as in FLamby, outside the guarantee.
"""
import os
import warnings
import numpy as np
import privfl
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

# Known of adults: age; sex; resting blood pressure, 120 mmHg is normal; cholesterol, desirable up
# to 200 mg/dl; sugar > 120 is rare; heart rate, about 85 % of 220 - age in a test; angina; ST
# depression, 1 mm is a sign; pain of kinds 2 to 4; ECG, mostly normal.
USUAL = np.array([50, 0.5, 120, 200, 0, 150, 0.5, 1, 0.5, 0.5, 0.5, 0, 0])
SPREAD = np.array([10, 0.5, 20, 50, 0.5, 25, 0.5, 1] + 5 * [0.5])
CLASS_WEIGHTS = torch.tensor([1.1, 0.9])  # healthy, ill: public, from UCI's 45 % and 55 %


def model():  # logistic regression, from zero
    return torch.nn.Linear(14, 1).apply(lambda layer: [p.data.zero_() for p in layer.parameters()])


def data(site, folder=None, scaling="public"):
    file = os.path.join(folder or os.environ.get("HEART_DISEASE_DIR", ""), f"processed.{site}.data")
    if not os.path.isfile(file) or scaling not in ("public", "flamby"):
        where = "set data_options.folder or HEART_DISEASE_DIR"
        raise ValueError(f"no file {file}, or no scaling {scaling!r}: {where}")
    rows = np.delete(np.genfromtxt(file, delimiter=",", missing_values="?"), [10, 11, 12], axis=1)
    rows = rows[~np.isnan(rows).any(axis=1)]
    # Of chest pain, and of resting ECG.
    kinds = np.hstack([rows[:, [2]] == [2, 3, 4], rows[:, [6]] == [1, 2]])
    x, y = np.hstack([rows[:, [0, 1, 3, 4, 5, 7, 8, 9]], kinds]), (rows[:, -1] > 0).astype(int)
    # FLamby's split, stratified where a hospital has both classes.
    strata = y if np.bincount(y).min() > 2 else None
    train, test = train_test_split(range(len(y)), test_size=0.34, random_state=43, stratify=strata)
    if scaling == "public":  # cholesterol 0 means not measured: neutral, and said in a column
        missing = x[:, [3]] == 0
        scaled = np.clip((x - USUAL) / SPREAD, -4, 4)
        x = np.hstack([scaled * ~(missing & (np.arange(13) == 3)), 5 * missing - 2.5])
    else:  # a column of equal rows is only centred; FLamby has no column for gaps
        said = "scaling flamby standardises by the site's records, without noise"
        warnings.warn(said, privfl.OutsideGuarantee, stacklevel=2)
        spread = np.where(np.ptp(x[train], axis=0), x[train].std(axis=0, ddof=1), 1)
        x = (x - x[train].mean(axis=0)) / spread
        x = np.hstack([x, np.zeros((len(x), 1))])
    x, y = torch.tensor(x).float(), torch.tensor(y)
    return [TensorDataset(x[part], y[part]) for part in (train, test)]


def loss(output, target, weight=None):
    target = target.float()
    return torch.nn.functional.binary_cross_entropy_with_logits(output[:, 0], target, weight)


def weighted_loss(output, target):
    return loss(output, target, CLASS_WEIGHTS.to(target.device)[target])


def accuracy(output, target):
    return ((output[:, 0] > 0) == target).sum(), len(target)


def balanced_accuracy(output, target):
    return target[(output[:, 0] > 0) == target].bincount(minlength=2), target.bincount(minlength=2)


def auc(output, target):
    gaps = output[target == 1] - output[target == 0].T  # of every pair of ill and healthy
    return (gaps > 0).sum() + (gaps == 0).sum() / 2, gaps.numel()
