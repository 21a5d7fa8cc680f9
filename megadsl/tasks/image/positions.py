"""Fixed positions in the plane: half of the features are a wave along rows, half along columns (as ViT baselines have them,
arXiv 2205.01580). Without torch.

Shape letters: n positions, h hidden.
"""

import numpy as np


def plane_waves(rows: int, columns: int, hidden_size: int, class_token: bool) -> np.ndarray:
    """[n, h] fp64 of root mean square 1, row by row; a class token comes first and stands at row -1, column -1.

    Four parts of h/4 features (the last one takes what h leaves): sine and cosine of the row, sine and cosine of the column, each
    times sqrt(2), at frequencies 10000^(-4i/h).
    """
    places = [(-1, -1)] * class_token + [(row, column) for row in range(rows) for column in range(columns)]
    quarter = -(-hidden_size // 4)
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    row, column = (np.outer(axis, frequencies) for axis in np.array(places, dtype=float).T)
    waves = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)
    return np.sqrt(2.0) * waves[:, :hidden_size]
