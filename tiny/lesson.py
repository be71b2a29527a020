# %% [markdown]
# # Which noise for which sample? A lesson in nine steps
#
# A rectified flow is a network that carries noise to data along lines that are meant to be straight. This lesson shows,
# on points in the plane, why it matters which noise belongs to which sample, what DANSM (Distance-Aware Noise-Sample
# Matching) does about it, and what is left of that when the points become images. Each step is a short text, a few
# lines of code and a picture; every number comes from the code beside it. You need the mathematics of school, and to
# have trained a network once.
#
# `python -m dansm.tiny.lesson` runs all of it in less than a minute and leaves the pictures in `runs/lesson`;
# `tiny/lesson.ipynb` is the same as a notebook.

# %%
import os
from pathlib import Path

import torch
from scipy import stats

import dansm
from dansm.scale.base.statistics import squared_distances
from dansm.tiny import digits, pictures, toy

SHAPE, SEED = "two-moons", 2
OUT = Path(os.environ.get("LESSON_OUT", "runs/lesson"))
OUT.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)  # so small a network is quicker on one

# %% [markdown]
# ## 1  Noise, data, and the lines between them
#
# A sample x is a point of two moons here: two numbers, where an image has thousands. A noise z is a point whose two
# numbers are drawn from the bell curve N(0, I). The flow is to carry each noise to a sample: at time t, from 0 to 1,
# the point is at x_t = t·x + (1 − t)·z, so it moves along a straight line with the velocity x − z. In training the
# network sees a point x_t and the time, and is asked for the velocity. Which noise belongs to which sample? Usually
# nobody chooses: each sample gets a random one, and the lines cross.

# %%
x, z = toy.points(SHAPE, 1000, "target", SEED), toy.points("noise", 1000, "start", SEED)

print(f"of all pairs of lines {toy.crossing_share(x, z):.1%} cross; the mean length is {dansm.path_length(x, z):.2f}")
pictures.draw_lines_that_cross(x, z, OUT / "1-lines.png")

# %% [markdown]
# ## 2  Where lines cross, the network learns their average
#
# The loss is a squared error, so the best answer at a point is the mean velocity of all lines that pass there at that
# time; where two cross, it follows neither. For random pairs this mean can be written down, with no training. A line
# that passes x_t on its way to a sample x has begun at z = (x_t − t·x) / (1 − t); the likelier this noise is, the more
# the sample counts, and that is one softmax. So here is the perfect network. At t = 0 all samples count alike, so its
# single step ends at the mean of all data, where there is none; in many small steps it does arrive, on bent paths. W2²
# tells how far from the data it ends: the mean squared distance when both sets are paired as cheaply as can be.
# Training on random pairs leads towards this network and no further, as it is the best answer itself; other pairs have
# another.

# %%
def perfect(x_t, t):
    """E[x − z | x_t] over random pairs. x_t: (B, 2), t: (B,) in [0, 999], as a flow calls its network → (B, 2)."""
    t = t[:, None, None] / 999
    begun_at = (x_t[:, None] - t * x) / (1 - t)  # (B, N, 2), the noise for each sample
    weights = torch.softmax(-begun_at.square().sum(2) / 2, 1)
    return (weights[:, :, None] * (x - begun_at)).sum(1)


flow = dansm.RectifiedFlow()
perfect_w2 = {steps: toy.wasserstein2(flow.sample(perfect, z, steps), x) for steps in toy.STEPS_SHOWN}
print("W2² of the perfect network:", ", ".join(f"{w2:.3f} in {steps}" for steps, w2 in perfect_w2.items()), "steps")
pictures.draw_average(x, flow.sample(perfect, z, 1), flow.path(perfect, z[::8], 50), perfect_w2, OUT / "2-average.png")

# %% [markdown]
# ## 3  The pool
#
# So let us choose. A pool holds `match_size` noises, drawn from N(0, I) as ever. The samples come one after the other,
# and each takes the nearest noise that is still there. For the samples after it that noise is gone: the first has the
# choice of all, the last takes what is left. This is the whole method; loss, network and sampler stay as they are.

# %%
spread = 832  # a seed whose points lie well apart
few = toy.points(SHAPE, 10, "few", spread)
pool = dansm.NoisePool(len(few), (2,), seed=spread)
taken = torch.cat([pool(sample) for sample in few.split(1)])

shuffled = taken[torch.randperm(len(taken), generator=dansm.noise_generator(spread))]
print(f"of all pairs of lines {toy.crossing_share(few, taken):.0%} cross, "
      f"with the same noises in random order {toy.crossing_share(few, shuffled):.0%}")
pictures.draw_pool(x, few, taken, (1, 4, 7, 10), OUT / "3-pool.png")

# %% [markdown]
# ## 4  The pool runs empty, and the prior stays what it was
#
# The last samples of a pool get long lines, as only far noises are left over. An empty pool is filled anew, in the
# middle of a batch if need be. Nothing drawn is thrown away, so over whole pools the noises used are exactly the noises
# drawn: samples of another shape take the very same ones from a pool of the same seed, in another order. It would be
# easier to draw a few noises for each sample, keep the nearest and throw away the rest; but those kept crowd around the
# data, and are N(0, I) no more, while sampling still starts from N(0, I). A test of their lengths tells the two apart:
# p is the chance that true noise strays as far from the curve.

# %%
stream = toy.points(SHAPE, 3000, "stream", SEED)
pool, again = (dansm.NoisePool(1000, (2,), seed=SEED) for _ in range(2))
matched = torch.cat([pool(batch) for batch in stream.split(256)])
for_roll = again(toy.points("swiss-roll", 3000, "stream", SEED))
kept = dansm.nearest_of_k(stream, 16, generator=dansm.noise_generator(SEED))

print("two moons and swiss roll used the same noises:", torch.equal(matched.unique(dim=0), for_roll.unique(dim=0)))
used = {"pool": matched, "nearest of 16": kept}
p = {name: stats.kstest(noise.norm(dim=1), "rayleigh").pvalue for name, noise in used.items()}
print(", ".join(f"{name}: p = {value:.2g}" for name, value in p.items()))
pictures.draw_prior(stream, used, 1000, 256, OUT / "4-prior.png")

# %% [markdown]
# ## 5  The one number to choose: `match_size`
#
# With one noise in the pool there is no choice: that is plain training. The more noises there are, the less the lines
# cross, and the shorter they are. They also pass each other at a greater distance, which is what the paper is named
# after: the inter-path distance is how near two points come that set out on two lines at the same moment. Most is won
# by a pool of modest size, then the curves flatten, and the lines are nearly as short as in the best pairing of all, by
# linear assignment (dotted). Whole pools are measured, as the first lines of a pool would flatter.

# %%
measured = {}
for match_size in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000):
    of_size = toy.measure_pairs(toy.training_pairs(SHAPE, "greedy", match_size, SEED), match_size)
    print(f"match_size {match_size:6,}: {of_size['crossing']:5.1%} cross, mean length {of_size['path_length']:.2f}, "
          f"inter-path distance {of_size['inter_path_mean']:.2f}")
    measured[match_size] = of_size

shortest = dansm.path_length(x, z[dansm.optimal(dansm.cost_matrix(x, z)).picks])
print(f"a thousand pairs, assigned at best: mean length {shortest:.2f}")
pictures.draw_match_sizes(measured, shortest, OUT / "5-match-size.png")

# %% [markdown]
# ## 6  Two trainings, equal but for the pairs
#
# Now a small network learns twice: from random pairs, and from matched ones. First weights, data, times, steps and
# learning rate are the same. With random pairs the loss falls almost to that of the perfect network of step two, and
# cannot fall further: what is left is lines that cross. With matched pairs far less is left. (The two losses are of two
# tasks; they do not say which flow samples better.) Then both networks carry the same noises in many small steps. The
# bend of a path is the mean square by which its velocity departs from that of the straight line between its ends, as a
# multiple of the latter's square; 0 is straight.

# %%
losses, nets = {"random": [], "greedy": []}, {}
for method, of_method in losses.items():
    pairs = toy.training_pairs(SHAPE, method, 1000, SEED)
    nets[method] = toy.train_flow(pairs, 1000, SEED, each_step=of_method.append)

noise, times = toy.points("noise", 4000, "least loss", SEED), torch.linspace(0, 0.999, 4000)
least = flow.loss(perfect, x.repeat(4, 1), noise, times).item()
found = {method: toy.measure_flow(net, x, z) for method, net in nets.items()}
print(f"least loss that random pairs allow: {least:.2f}")
for method, name in pictures.NAMES.items():
    print(f"{name}: mean loss of the last hundred steps {torch.stack(losses[method][-100:]).mean():.2f}, "
          f"median bend of a path {found[method]['straightness']:.2f}")
paths = {method: flow.path(net, z[::8], 50) for method, net in nets.items()}
pictures.draw_trainings(losses, least, paths, found, OUT / "6-training.png")

# %% [markdown]
# ## 7  Few steps, many steps
#
# Each step of sampling costs one evaluation of the network; both begin with the same noises. In one step the random
# flow ends where the perfect network did, in the middle; the matched one is nearly there. With more steps the random
# flow catches up. With many there is no difference to speak of: both come about as near as other points of the data do.
# Here matching does not make the best samples better; it makes few steps enough.

# %%
w2 = {method: found[method]["w2"] for method in nets}
floor = toy.wasserstein2(x, toy.points(SHAPE, 1000, "floor", SEED))

for method, of_method in w2.items():
    listed = ", ".join(f"{value:.3f} in {steps}" for steps, value in of_method.items())
    print(f"W2² of {pictures.NAMES[method]}: {listed} steps")
print(f"W2² of other points of the data: {floor:.3f}")
samples = {pictures.NAMES[method]: {f"steps: {steps}": (x, flow.sample(net, z, steps), f"W2² {w2[method][steps]:.3f}")
                                    for steps in toy.STEPS_SHOWN} for method, net in nets.items()}
pictures.draw_samples(samples, OUT / "7-steps.png")

# %% [markdown]
# ## 8  The batch size does not matter
#
# Others pair each batch within itself, by linear assignment: the cheapest pairing that there is. Its scope ends with
# the batch, so small batches gain little, and a batch of one nothing. Large models are trained with few samples a GPU.
# The pool outlives the batch: served one by one, the samples get the very noises that they get in large batches. A
# large batch, assigned as well as can be, does beat the pool, which serves its last samples badly; but the time that
# assignment takes grows with the cube of the batch.

# %%
pool = dansm.NoisePool(1000, (2,), seed=SEED)
one_by_one = torch.cat([pool(sample) for sample in stream.split(1)])
print(f"one by one, {(one_by_one == matched).all(1).sum():,} of {len(stream):,} samples get the noise of step four")

within = {size: torch.cat([noise for _, noise in dansm.pairs(stream.split(size), "optimal", size, seed=SEED)])
          for size in (1, 3, 10, 30, 100, 300, 1000)}
some = slice(None, None, 3)  # a thousand lines, from all over the pools
crossing = {size: toy.crossing_share(stream[some], noise[some]) for size, noise in within.items()}
of_pool = toy.crossing_share(stream[some], one_by_one[some])
print("within batches:", ", ".join(f"{share:.1%} cross at {size}" for size, share in crossing.items()))
print(f"pool of {pool.match_size:,}: {of_pool:.1%} cross at any batch size")
shown = {"assigned within batches of 10": within[10], "pool, any batch size": one_by_one}
pictures.draw_batches(crossing, of_pool, stream, shown, OUT / "8-batches.png")

# %% [markdown]
# ## 9  From the plane to images
#
# Most carries over as it is: the pool, the prior, that the batch size does not matter. One thing becomes smaller. With
# many numbers to a sample all noises are about equally far away, so the nearest is hardly nearer than the rest: on
# these handwritten digits, small as they are, matching takes some per cent off the lines where in the plane it takes
# most, and on larger images less still (`results/foundations`). That is enough to be seen: `dansm digits` trains on
# these images both ways, and shows what both draw in few steps. In your own trainer, `pool(images)` below is what comes
# in the place of `torch.randn_like(images)`, and that is all. From here, `dansm train FOLDER` does it with images of
# yours, and `dansm.py` is the method itself, to be read from top to bottom.

# %%
images = digits.load_digits()
images = images[torch.randint(len(images), (10_000,), generator=dansm.noise_generator(SEED))]

lengths = {}
for match_size in (1, 10, 100, 1000, 10_000):
    pool = dansm.NoisePool(match_size, images.shape[1:], seed=SEED)
    lengths[match_size] = dansm.path_length(images, pool(images))
shares = {"two moons": {size: measured[size]["path_length"] / measured[1]["path_length"] for size in lengths},
          "digits": {size: length / lengths[1] for size, length in lengths.items()}}
for name, of_size in shares.items():
    print(f"{name}:", ", ".join(f"{1 - share:.1%} shorter at {size:,}" for size, share in of_size.items()))

distances = {"two moons": squared_distances(x[:200], z).sqrt(),
             "digits": squared_distances(images[:200], pool(images[:1000])).sqrt()}
pictures.draw_dimensions(images, distances, shares, OUT / "9-images.png")
