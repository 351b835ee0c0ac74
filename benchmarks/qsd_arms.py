"""Each ingredient against a float ViT, on all images of MNIST's test set and on digits.

The ViT learns four fifths of the images and is tested on the rest, in five folds, so that every
image is held out once: 10,000 of MNIST's test set, 1,797 of scikit-learn's digits. Its weights are
the start of every spiking network. *Direct* is 4-bit weights and plain LIF neurons (D = 1), trained
on labels; *IE-LIF* has D levels; *IE-LIF + logits* adds the ViT's predictions and *QSD* also the
relations of q, k and v (FGD, reconstructed: no code of it is public). All of them take the same
batches and steps, at the same rate and weights of the loss: 800 steps of 64 images of MNIST (in
*MNIST, longer* 2,500, which is what the ViT took), 400 of digits. *ViT, trained on* takes those
steps as well and is the fair bound. Intervals are 95 % of a bootstrap over held-out images, paired
where arms are compared; they do not hold the chance of another start.

Sizes are of stored tensors (files are larger, see below), real parameters, and the bit equivalents
that papers print.
E = 4.6 pJ x MAC + 0.9 pJ x AC for one image, spike by spike; a ViT has MACs only, softmax, norms
and GELU not counted. Entropy is that of the levels of q, k and v in bits, a mean over channels and
blocks: the information a neuron passes on. On cores that four programs shared, a cell of MNIST took
2 to 6 minutes and one of digits 1 to 3.
"""

from functools import partial

import numpy as np
import torch
from cells import table
from qsd_lab import LONGER, SETTINGS, from_hex, images, learn, options, right, rows, to_hex, vit
from sweep import NOT_RUN, mean

from compressor.distill import ce
from compressor.model.count import count_parameters
from compressor.model.qsd_cost import FORMULA, MAC_PJ, vit_products
from compressor.quantize import qsd
from compressor.quantize.sizes import sizes

TITLE = "Ingredients"
MODELS = ("MNIST", LONGER, "digits")
LOSSES = {
    "direct": {"logits": 0.0, "relations": 0.0},
    "IE-LIF": {"logits": 0.0, "relations": 0.0},
    "IE-LIF + logits": {"relations": 0.0},
    "QSD": {},
}
FLOAT = ("ViT", "ViT, trained on")
# (arm, bits, T, D), the most important first
ARMS = (
    *(("ViT", 32, 0, 0), ("direct", 4, 1, 1), ("IE-LIF", 4, 1, 4), ("QSD", 4, 1, 4)),
    *(("direct", 4, 4, 1), ("IE-LIF + logits", 4, 1, 4), ("ViT, trained on", 32, 0, 0)),
    *(("QSD", 2, 1, 4), ("direct", 2, 1, 1), ("IE-LIF", 2, 1, 4), ("IE-LIF + logits", 2, 1, 4)),
    *(("QSD", 4, 1, 1), ("QSD", 2, 1, 1), ("QSD", 4, 1, 2), ("IE-LIF", 4, 1, 2)),
    *(("QSD", 2, 1, 2), ("QSD", 4, 4, 1), ("direct", 2, 4, 1), ("QSD", 2, 4, 1)),
)
# as many steps as the ViT took
LONGER_ARMS = (
    *(("ViT", 32, 0, 0), ("QSD", 4, 1, 4), ("IE-LIF + logits", 4, 1, 4), ("IE-LIF", 4, 1, 4)),
    *(("ViT, trained on", 32, 0, 0), ("direct", 4, 1, 1), ("direct", 4, 4, 1)),
    *(("IE-LIF", 2, 1, 4), ("QSD", 2, 1, 4)),
)
# (what is gained, with it, without it), at 4 and at 2 bits
GAINS = (
    ("IE-LIF, 1x4 for 1x1", ("IE-LIF", 1, 4), ("direct", 1, 1)),
    ("IE-LIF, 1x4 for 4x1", ("IE-LIF", 1, 4), ("direct", 4, 1)),
    ("logits", ("IE-LIF + logits", 1, 4), ("IE-LIF", 1, 4)),
    ("relations of q, k, v", ("QSD", 1, 4), ("IE-LIF + logits", 1, 4)),
    ("logits and relations", ("QSD", 1, 4), ("IE-LIF", 1, 4)),
    ("logits and relations, 1x1", ("QSD", 1, 1), ("direct", 1, 1)),
    ("all", ("QSD", 1, 4), ("direct", 1, 1)),
)
EDGES = np.linspace(-1.5, 1.5, 61)  # of the histogram of membrane potentials


def key(data, arm, bits, steps, levels, fold):
    shape = "" if arm in FLOAT else f" {bits} bits {steps}x{levels}"
    return f"{data} {arm}{shape} fold {fold}"


def arms_of(data):
    return LONGER_ARMS if data == LONGER else ARMS


def run(cells, model, seeds):
    """Every arm with every fold."""
    for arm in arms_of(model):
        for fold in seeds:
            make = float_cell if arm[0] in FLOAT else spiking_cell
            cells.run(key(model, *arm, fold), partial(make, model, *arm, fold))


def float_cell(data, arm, bits, steps, levels, fold):
    """The ViT as it is, or after as many steps more as its spiking networks take."""
    model = vit(data, fold)
    if arm == "ViT, trained on":
        chosen = ce.Options(train=options(SETTINGS[data][2]))
        learn(model, data, fold, ce, chosen)
    count, products = count_parameters(model.module), vit_products(model.config)
    found = right(model, data, fold)
    return {
        **{"right": to_hex(found), "images": len(found), "accuracy": float(found.float().mean())},
        **{"parameters": count, "bit_equivalents": count, "bytes": 4 * count},
        **{"mac": products, "ac": 0, "energy_nj": MAC_PJ * products / 1000},
    }


def spiking_cell(data, arm, bits, steps, levels, fold):
    """A spiking network that started from the ViT."""
    model = vit(data, fold)
    chosen = qsd.Options(
        **{"bits": bits, "time_steps": steps, "levels": levels} | LOSSES[arm],
        train=options(SETTINGS[data][2]),
    )
    learn(model, data, fold, qsd, chosen, vit(data, fold))
    found, spikes, size = right(model, data, fold), model.notes["spikes"], sizes(model)
    return {
        **{"right": to_hex(found), "images": len(found), "accuracy": float(found.float().mean())},
        **{"parameters": count_parameters(model.module), "bytes": size["stored_bytes"]},
        # what papers print for parameters: numbers of 32 bits that take as much
        **{"bit_equivalents": round(size["weights"] * bits / 32 + size["float"])},
        **{name: spikes[name] for name in ("mac", "ac", "energy_nj", "firing_rate", "entropy")},
        **{"membranes": membranes(model, data, fold)},
    }


@torch.no_grad()
def membranes(model, data, fold):
    """Share of the potentials of q, k and v of the last block in every bin of EDGES."""
    pixels, found = images(data)[0][rows(data, fold)[1][:500]], {}
    attention = model.module.qsd.layers[-1].attention
    for name in "qkv":
        norm = getattr(attention, f"{name}_neuron").norm
        seen = []
        hook = norm.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y))
        model.module(pixel_values=pixels)
        hook.remove()
        counts, _ = np.histogram(seen[0].clamp(EDGES[0], EDGES[-1]).numpy(), EDGES)
        found[name] = [round(count / counts.sum(), 5) for count in counts.tolist()]
    return found


def section(cells):
    """Two tables for each data set, and what potentials look like."""
    blocks = [f"`{FORMULA}`"]
    for data in MODELS:
        blocks += [f"### {data}", _arms(cells, data), _gains(cells, data)]
    return blocks + _chart(cells)


def _found(cells, data, arm):
    """{fold: cell} of what was run."""
    named = {fold: cells.found.get(key(data, *arm, fold)) for fold in range(5)}
    return {fold: cell for fold, cell in named.items() if cell}


def _arms(cells, data):
    header = ["network", "weights", "T x D", "accuracy %", "interval", "to the ViT", "interval"]
    header += ["bytes", "smaller", "parameters", "bit equivalents", "MAC", "AC", "nJ", "less"]
    header += ["firing %", "entropy q, k, v", "folds", "seconds a cell"]
    return table(header, [_row(cells, data, arm) for arm in _ordered(data)])


def _ordered(data):
    floats = [arm for arm in arms_of(data) if arm[0] in FLOAT]
    names = list(LOSSES)
    rest = [arm for arm in arms_of(data) if arm[0] not in FLOAT]
    return floats + sorted(rest, key=lambda a: (-a[1], a[2] != 1, a[3], names.index(a[0])))


def _row(cells, data, arm):
    found, base = _found(cells, data, arm), _found(cells, data, ARMS[0])
    shape = ["32", ""] if arm[0] in FLOAT else [str(arm[1]), f"{arm[2]}x{arm[3]}"]
    if not found:
        return [arm[0], *shape, *[NOT_RUN] * 16]
    own = np.concatenate([from_hex(cell["right"], cell["images"]) for cell in found.values()])
    pairs = difference(found, base)
    first = next(iter(base.values()), None)
    values = {name: mean([cell[name] for cell in found.values()]) for name in ("mac", "ac")}
    energy, size = (mean([c[name] for c in found.values()]) for name in ("energy_nj", "bytes"))
    any_cell = next(iter(found.values()))
    return [
        *(arm[0], *shape, f"{100 * own.mean():.2f}", interval(own.astype(int))),
        *(f"{100 * pairs.mean():+.2f}" if len(pairs) else "", interval(pairs)),
        *(f"{size:.0f}", f"{first['bytes'] / size:.1f}x" if first else ""),
        *(str(any_cell["parameters"]), str(any_cell["bit_equivalents"])),
        *(f"{values['mac']:.0f}", f"{values['ac']:.0f}", f"{energy:.0f}"),
        f"{first['energy_nj'] / energy:.1f}x" if first else "",
        *_spikes(found),
        *(str(len(found)), f"{mean([c['cell_seconds'] for c in found.values()]):.0f}"),
    ]


def _spikes(found):
    cells = [cell for cell in found.values() if "entropy" in cell]
    if not cells:
        return ["", ""]
    bits = ", ".join(f"{mean([c['entropy'][k] for c in cells]):.2f}" for k in "qkv")
    return [f"{100 * mean([c['firing_rate'] for c in cells]):.1f}", bits]


def difference(own, other):
    """Right minus right for every image that both arms were tested on: -1, 0, 1."""
    parts = []
    for fold in own.keys() & other.keys():
        first, second = (from_hex(c[fold]["right"], c[fold]["images"]) for c in (own, other))
        parts.append(first.astype(int) - second.astype(int))
    return np.concatenate(parts) if parts else np.zeros(0, int)


def interval(values):
    """95 % of the means of 10,000 resamples of integers -1, 0, 1, in per cent."""
    if not len(values):
        return ""
    shares = [(values == v).mean() for v in (-1, 0, 1)]
    draws = np.random.default_rng(0).multinomial(len(values), shares, 10_000) / len(values)
    low, high = np.percentile(100 * (draws[:, 2] - draws[:, 0]), [2.5, 97.5])
    return f"{low:.2f} to {high:.2f}"


def _gains(cells, data):
    lines = []
    for bits in (4, 2):
        for what, own, other in GAINS:
            arms = [(arm, bits, steps, levels) for arm, steps, levels in (own, other)]
            if not set(arms) <= set(arms_of(data)):
                continue
            pairs = difference(*(_found(cells, data, arm) for arm in arms))
            said = [f"{100 * pairs.mean():+.2f}", interval(pairs)] if len(pairs) else [NOT_RUN] * 2
            lines.append([what, str(bits), *said, _beyond(pairs), str(len(pairs))])
    return table(["gain", "weights", "points", "interval", "beyond it", "images"], lines)


def _beyond(pairs):
    if not len(pairs):
        return ""
    low, high = (float(end) for end in interval(pairs).split(" to "))
    return "yes" if low > 0 else "loss" if high < 0 else "no"


def _chart(cells):
    """Potentials of q, k and v without and with IE-LIF and FGD, of the first fold."""
    arms = {"direct, 1x1": ("direct", 4, 1, 1), "QSD, 1x4": ("QSD", 4, 1, 4)}
    found = {n: cells.found.get(key("MNIST", *arm, 0)) for n, arm in arms.items()}
    if not all(found.values()):
        return [f"Membrane potentials: {NOT_RUN}."]
    name = "qsd-membranes.svg"
    draw(found, cells.page.with_name(name))
    said = (
        "Membrane potentials of q, k and v in the last block (4 bits, MNIST, fold 0), from -1.5 to "
        "1.5. Grey lines are the thresholds: one of plain LIF at 1/2, four of IE-LIF."
    )
    return [said, f"![membrane potentials]({name})"]


def draw(found, path):
    """An SVG of histograms: a row for every arm, a column for q, k and v."""
    wide, high, marks = 220, 120, []
    for row, (name, cell) in enumerate(found.items()):
        levels = 4 if "1x4" in name else 1
        for column, part in enumerate("qkv"):
            left, low = 20 + column * (wide + 20), (row + 1) * (high + 40) - 10
            scale = high / max(cell["membranes"][part][1:-1])
            for level in range(levels):
                x = left + wide * ((level + 0.5) / levels + 1.5) / 3
                marks.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low - high}" y2="{low}" stroke="#bbb"/>'
                )
            points = " ".join(
                f"{left + wide * (i + 0.5) / 60:.1f},{low - min(high, share * scale):.1f}"
                for i, share in enumerate(cell["membranes"][part])
            )
            marks.append(f'<polyline points="{points}" fill="none" stroke="#06c"/>')
            marks.append(f'<text x="{left}" y="{low - high - 6}">{name}: {part}</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 340"'
    body = "\n".join(marks)
    path.write_text(f'{head} font-size="12" font-family="sans-serif">\n{body}\n</svg>\n')
