"""Which tokens each expert of a layer takes: shares, information, lift and overlap, from every token's choice.

Shape letters: T tokens, K experts per token, E experts, X labels (sources or kinds of tokens), U token types.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 3.0  # standard deviations of the bound of a token's lift; thousands of tokens are compared, so 2 would be too few
SHUFFLES = 5
LISTED = 12  # tokens of an expert
NEIGHBORS = 5  # experts that share an expert's tokens, or have similar weights


@dataclass(frozen=True)
class Labels:
    """A label of every token, and the same labels shuffled."""

    names: list[str]  # [X]
    of_token: np.ndarray  # [T], indices of names
    shuffled: list[np.ndarray]  # each [T]


@dataclass(frozen=True)
class Text:
    """The tokens that the experts were chosen for, in the order of the sources."""

    sources: Labels
    kinds: Labels
    tokens: list[str]  # [U], the text of each type that is frequent enough
    type_of_token: np.ndarray  # [T], index of each token's type, -1 if it is too rare
    counts: np.ndarray  # [U], occurrences of each type


def shuffled(labels_T: np.ndarray, groups_T: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Return `SHUFFLES` permutations of the labels [T], in which tokens of a group keep a common label.

    Args:
        groups_T: ascending numbers from 0; tokens of a group have one label.
    """
    random, label_G = np.random.default_rng(seed), labels_T[np.unique(groups_T, return_index=True)[1]]
    return [random.permutation(label_G)[groups_T] for _ in range(SHUFFLES)]


def cross_counts(labels_T: np.ndarray, chosen_TK: np.ndarray, labels: int, experts: int) -> np.ndarray:
    """Return how many tokens of each label go to each expert, [X, E]."""
    keys_TK = labels_T.astype(np.int64)[:, None] * experts + chosen_TK
    return np.bincount(keys_TK.ravel(), minlength=labels * experts).reshape(labels, experts)


def mutual_information(counts_XE: np.ndarray) -> float:
    """Return the bits that one choice of an expert and the token's label say about each other (Cover and Thomas, Elements of
    Information Theory, equation 2.28)."""
    joint_XE = counts_XE / counts_XE.sum()
    independent_XE = joint_XE.sum(1, keepdims=True) * joint_XE.sum(0)
    some = joint_XE > 0
    return max(0.0, float((joint_XE[some] * np.log2(joint_XE[some] / independent_XE[some])).sum()))


def entropy(counts_X: np.ndarray) -> float:
    """Return the entropy of labels with these counts in bits."""
    share_X = counts_X[counts_X > 0] / counts_X.sum()
    return float(-(share_X * np.log2(share_X)).sum())


def lower_bound(hits: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Return the lower bound of a probability, `Z` standard deviations below (Wilson 1927, Probable Inference, the Law of
    Succession, and Statistical Inference). It shrinks the proportion of rare events."""
    share, z2 = hits / trials, Z * Z
    spread = Z * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return (share + z2 / (2 * trials) - spread) / (1 + z2 / trials)


def layer_statistics(text: Text, chosen_TK: np.ndarray, weight_E: np.ndarray) -> dict[str, Any]:
    """Return what `experts.json` has of a layer and its experts, except ablation and similarity of weights.

    Args:
        weight_E: sums of the router's weights.
    """
    experts = len(weight_E)
    rows_E = np.bincount(chosen_TK.ravel(), minlength=experts)
    result: dict[str, Any] = {"max_vio": _round(rows_E.max() / rows_E.mean() - 1)}
    shares: dict[str, np.ndarray] = {}
    context = [
        _beyond_type(text, other_T, chosen_TK, experts) for other_T in (text.sources.of_token, *text.sources.shuffled)
    ]
    result |= {"context_bits": _round(context[0]), "context_bits_shuffled": _round(np.mean(context[1:]))}
    for name, labels in (("source", text.sources), ("kind", text.kinds)):
        found = len(labels.names)
        counts_XE = shares[name] = cross_counts(labels.of_token, chosen_TK, found, experts)
        by_chance = [
            mutual_information(cross_counts(other_T, chosen_TK, found, experts)) for other_T in labels.shuffled
        ]
        result[f"{name}_bits"] = _round(mutual_information(counts_XE))
        result[f"{name}_bits_shuffled"] = _round(np.mean(by_chance))
    is_frequent_T = text.type_of_token >= 0
    counts_UE = cross_counts(text.type_of_token[is_frequent_T], chosen_TK[is_frequent_T], len(text.tokens), experts)
    tokens = _top_tokens(text, counts_UE, rows_E / len(chosen_TK))
    together_EE = _together(chosen_TK, experts) / np.maximum(rows_E, 1)[:, None]
    same_EE = cosines(counts_UE.T @ counts_UE.astype(np.float64))
    of_source_XE = shares["source"] / np.maximum(shares["source"].sum(1, keepdims=True), 1)
    of_kind_XE = shares["kind"] / np.maximum(rows_E, 1)
    usual_X = shares["kind"].sum(1) / rows_E.sum()
    result["experts"] = [
        {
            "load": _round(rows_E[e] / rows_E.sum()),
            "weight": _round(weight_E[e] / rows_E[e]) if rows_E[e] else None,
            "sources": dict(zip(text.sources.names, map(_round, of_source_XE[:, e]), strict=True)),
            "kinds": {
                name: {"share": _round(share), "lift": _round(share / usual)}
                for name, share, usual in zip(text.kinds.names, of_kind_XE[:, e], usual_X, strict=True)
                if share
            },
            "tokens": tokens[e],
            "shared_tokens": nearest(together_EE, e),
            "same_token_types": nearest(same_EE, e),
        }
        for e in range(experts)
    ]
    return result


def _beyond_type(text: Text, sources_T: np.ndarray, chosen_TK: np.ndarray, experts: int) -> float:
    """Return the bits that a choice says about the source if the type of the token is known: whether an expert takes the
    same tokens more in one source than in another. Over frequent types, I(expert; source, type) - I(expert; type)."""
    known, types = text.type_of_token >= 0, len(text.tokens)
    if not known.any():
        return 0.0
    type_T, chosen_TK, found = text.type_of_token[known], chosen_TK[known], len(text.sources.names)
    both_XE = cross_counts(type_T * found + sources_T[known], chosen_TK, types * found, experts)
    return mutual_information(both_XE) - mutual_information(both_XE.reshape(types, found, experts).sum(1))


def _top_tokens(text: Text, counts_UE: np.ndarray, usual_E: np.ndarray) -> list[list[dict[str, Any]]]:
    """Return each expert's tokens whose lift, P(expert | token) / P(expert), surely exceeds 1, by its lower bound."""
    trials_U = text.counts[:, None]
    bound_UE = lower_bound(counts_UE, trials_U) / np.maximum(usual_E, 1e-12)
    lift_UE = counts_UE / trials_U / np.maximum(usual_E, 1e-12)
    tops = []
    for e in range(len(usual_E)):
        best = np.argsort(-bound_UE[:, e], kind="stable")[:LISTED]
        tops.append([
            {
                "text": text.tokens[u],
                "count": int(counts_UE[u, e]),
                "lift": _round(lift_UE[u, e]),
                "lift_at_least": _round(bound_UE[u, e]),
            }
            for u in best
            if bound_UE[u, e] > 1
        ])  # fmt: skip
    return tops


def _together(chosen_TK: np.ndarray, experts: int) -> np.ndarray:
    """Return how many tokens each pair of experts has in common, [E, E], 0 on the diagonal."""
    pairs_EE = np.zeros((experts, experts), np.int64)
    for first in range(chosen_TK.shape[1]):
        for second in range(first):
            pairs_EE += cross_counts(chosen_TK[:, first], chosen_TK[:, second, None], experts, experts)
    return pairs_EE + pairs_EE.T


def cosines(gram_EE: np.ndarray) -> np.ndarray:
    """Return the cosines [E, E] between vectors with this Gram matrix."""
    norm_E = np.sqrt(np.maximum(gram_EE.diagonal(), 1e-30))
    return gram_EE / norm_E / norm_E[:, None]


def nearest(matrix_EE: np.ndarray, expert: int) -> list[list[float]]:
    """Return the other experts with the largest values in the expert's row, each with its value."""
    row_E = matrix_EE[expert].astype(np.float64)
    row_E[expert] = -np.inf
    best = np.argsort(-row_E, kind="stable")[: min(NEIGHBORS, len(row_E) - 1)]
    return [[int(other), _round(row_E[other])] for other in best]


def _round(value: Any) -> float:
    return round(float(value), 5)
