"""The modules that AttnZero ships, as programs, and the attention that its configuration starts from.

A number is a position in its list of candidates. `bench_1` and `bench_2` are in templates of its benchmark, without a
number. Its `cosine_similarity` compares a tensor with itself, which gives the number one for one image. Trials 20 and
40 add dimensions that a program does not have: these are their formulas without them.
"""

from __future__ import annotations

LINEAR = "mul(mm(elu1(q) tn(elu1(k) v)) recip(nt(elu1(q) sum(elu1(k)))))"
"""(φ(Q) (φ(K)ᵀ V)) / (φ(Q) Σ φ(K) + 1e-6), φ = elu + 1."""

FOUND: dict[str, str] = {
    "attnzero_105": "mul(l2(mm(l2(q) zscore(tn(minmax(v) elu1(k))))) q)",
    "attnzero_140": "add(l2(nt(abs(v) sigmoid(tn(elu1(k) scale(v))))) l2t(q))",
    "attnzero_240": "nt(l2t(add(l2t(add(sigmoid(relu(k)) softsign(v))) q)) "
    "l2t(tn(v l2t(add(l2t(add(sigmoid(relu(k)) softsign(v))) q)))))",
    "attnzero_272": "add(softmax(nt(v sign(tn(v abslog(k))))) softsign(q))",
    "attnzero_20": "mul(mul(k sigmoid(q)) softsign(v))",
    "attnzero_25": "mul(cosigmoid(mul(q sign(k))) l2(v))",
    "attnzero_34": "mul(add(sign(v) softmax(q)) zscore(mul(l2t(k) v)))",
    "attnzero_40": "q",
    "attnzero_76": "add(relu(q) softmax(mul(neg(scale(q)) sqrt(one))))",
    "attnzero_80": "add(minmax(one) scale(v))",
    "attnzero_174": "add(q sumnorm(l2t(mul(cosigmoid(v) relu(softsign(one))))))",
    "attnzero_228": "mul(cosigmoid(v) sigmoid(add(k q)))",
    "attnzero_bench_1": "add(elu1(q) neg(one))",
    "attnzero_bench_2": "mul(cosigmoid(add(l2(k) l2t(abslog(v)))) sumnorm(add(abslog(v) cosigmoid(q))))",
}
"""Programs by the name of their operator; the first four mix tokens by their content."""
