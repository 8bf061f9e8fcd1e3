"""The linker written slowly: one mention, one candidate, lists and loops, float64. Knows nothing of the library."""

import math

import numpy as np


def softmax(x):
    x = np.asarray(x, float)
    e = np.exp(x - x.max())
    return e / e.sum()


def coherence(candidates, members, a, b, keep, uniform):
    """Scores of candidate vectors against a list of vectors."""
    if not members or not len(candidates):
        return [0.0] * len(candidates)
    u = [max(sum(e[i] * a[i] * s[i] for i in range(len(s))) for e in candidates) for s in members]
    kept = sorted(range(len(members)), key=lambda j: (-u[j], j))[:keep]
    beta = [1 / len(kept)] * len(kept) if uniform else softmax([u[j] for j in kept])
    mixed = sum(w * np.asarray(members[j], float) for w, j in zip(beta, kept, strict=True))
    return [float(np.sum(np.asarray(e, float) * b * mixed)) for e in candidates]


def convolve(words, weights):
    """Largest value of a convolution of width 3 over a text's vectors, by channel; zeros around it."""
    if not len(words):
        return np.zeros(weights["bias"].shape)
    d = words.shape[1]
    padded = np.concatenate([np.zeros((1, d)), words, np.zeros((1, d))])
    out = [
        sum(padded[t + i] @ weights["kernel"][i] for i in range(3)) + weights["bias"] for t in range(len(words))
    ]
    return np.max(out, axis=0)


def features(linker, p, kb, mention, chosen, linked):
    """The features of a mention's candidates given the sets chosen so far (lists of numbers in order of arrival)."""
    e = [kb["entities"][c] for c in mention["candidates"]]
    out = {"prior": list(mention["log_prior"])}
    if linker.uses_local and linker.local == "attention":
        context = [kb["words"][w] for w in mention["context"]]
        out["local"] = coherence(e, context, p["local"]["attend"], p["local"]["score"], linker.keep_tokens, False)
    elif linker.uses_local:
        x = convolve(kb["words"][mention["context"]], p["local"])
        out["local"] = []
        for c in mention["candidates"]:
            y = convolve(kb["words"][[w for w in kb["descriptions"][c] if w]], p["local"])
            size = math.sqrt(float(x @ x) * float(y @ y))
            out["local"].append(float(x @ y) / size if size else 0.0)
    if "types" in linker.features:
        table = p["types"]
        out["types"] = [float(table[mention["type"]] @ table[kb["types"][c]]) for c in mention["candidates"]]
    few = linker.attention == "soft_hard"
    for name, members, keep in (
        ("entities", [kb["entities"][c] for c in chosen], linker.keep_entities if few else linker.keep_soft),
        ("words", [kb["words"][w] for w in linked], linker.keep_words if few else linker.keep_soft),
    ):
        if name in linker.features:
            w = p[name]
            out[name] = coherence(e, members, w["attend"], w["score"], keep, linker.attention == "mean")
    return out


def combine(linker, p, found, n):
    """The scoring network, a candidate at a time."""
    out = []
    for i in range(n):
        x = np.array([found[name][i] for name in linker.features])
        h = np.maximum(x @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        out.append(float((h @ p["out"]["kernel"] + p["out"]["bias"])[0]))
    return out


def link(linker, p, kb, mentions, decisions=None):
    """Links one document: (choices, scores, sizes of both sets before each mention)."""
    chosen, linked, choices, scores, sizes = [0], [0], [], [], []
    for t, m in enumerate(mentions):
        sizes.append((len(chosen), len(linked)))
        s = combine(linker, p, features(linker, p, kb, m, chosen, linked), len(m["candidates"]))
        best = int(np.argmax(s)) if s else -1
        choice = best if decisions is None else decisions[t]
        choices.append(choice)
        scores.append(s)
        if choice >= 0:
            c = m["candidates"][choice]
            if c not in chosen:
                chosen.append(c)
            for w in kb["inlinks"][c]:
                if w and w not in linked:
                    linked.append(w)
    return choices, scores, sizes


def belief(linker, p, kb, mentions):
    """Scores by loopy belief propagation over all pairs, message by message."""
    none = [features(linker, p, kb, m, [], []) for m in mentions]
    count = len(mentions)
    psi = [f["local"] for f in none]

    def phi(i, a, j, b):
        x, y = kb["entities"][mentions[i]["candidates"][a]], kb["entities"][mentions[j]["candidates"][b]]
        return 2 / max(count - 1, 1) * float(np.sum(x * p["pairs"] * y))

    size = [len(m["candidates"]) for m in mentions]
    mbar = {(i, j): np.full(size[j], -math.log(max(size[j], 1))) for i in range(count) for j in range(count) if i != j}
    for _ in range(linker.iterations):
        new = {}
        for i, j in mbar:
            m = []
            for b in range(size[j]):
                m.append(
                    max(
                        (
                            psi[i][a] + phi(i, a, j, b) + sum(mbar[k, i][a] for k in range(count) if k not in (i, j))
                            for a in range(size[i])
                        ),
                        default=-1e30,
                    )
                )
            old = (1 - linker.damping) * np.exp(mbar[i, j])
            new[i, j] = np.log(linker.damping * softmax(m) + old) if m else mbar[i, j]
        mbar = new
    out = []
    for i in range(count):
        total = [psi[i][a] + sum(mbar[k, i][a] for k in range(count) if k != i) for a in range(size[i])]
        found = none[i] | {"belief": list(softmax(total)) if total else []}
        out.append(combine(linker, p, found, size[i]))
    return out
