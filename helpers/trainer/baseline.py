"""A training script in one file: linear regression on a CSV file, with nothing but pandas and NumPy.

    python baseline.py --data /gcs/bucket/rows.csv --target price --model_dir /gcs/bucket/model

It opens files as any Python program does, so it wants /gcs/ where TensorFlow takes gs://.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True)
parser.add_argument("--target", required=True)
parser.add_argument("--model_dir", required=True)
asked = parser.parse_args()

# A column for each number and for each category, and one for the intercept.
rows = pd.read_csv(asked.data)
x = pd.get_dummies(rows.drop(columns=asked.target), dtype=float).assign(intercept=1.0)
weights = np.linalg.lstsq(x, rows[asked.target])[0]
rmse = np.sqrt(np.mean((x @ weights - rows[asked.target]) ** 2))
print(f"training RMSE {rmse:.0f}")

folder = Path(asked.model_dir)
folder.mkdir(parents=True, exist_ok=True)
pd.Series(weights, x.columns).to_json(folder / "weights.json", indent=1)
