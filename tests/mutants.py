"""Does the test suite notice?  Each mutant is one wrong edit of the code that some test must fail on.

    python tests/mutants.py            # all, about 10 minutes on one core
    python tests/mutants.py sketch     # those whose file or description holds the word

Every mutant is applied to a copy of the repository, so the checkout is never touched.  Exit code 1
if a mutant survives or its text is no longer found.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (file, text, replacement, what is wrong, tests that should notice)
MUTANTS = [
    ("opus_bench/sequences.py", "tokens[:, label_shift:], (0, label_shift)", "tokens[:, label_shift - 1 : -1], (0, label_shift)",
     "off-by-one label shift", "gradients"),
    ("opus_bench/sequences.py", "m.bool()[:, label_shift:]", "m.bool()[:, :-label_shift]", "mask not shifted with the labels", "architectures"),
    ("opus_bench/sequences.py", "torch.where(counted, losses, 0).sum(1) / counted.sum(1)", "torch.where(counted, losses, 0).mean(1)",
     "masked tokens count in the mean", "architectures"),
    ("opus_bench/sequences.py", "masks[0] & masks[1]", "masks[0] | masks[1]", "padding or loss mask ignored", "architectures"),
    ("opus_bench/gradients.py", "isinstance(module, nn.Embedding | Conv1D)", "isinstance(module, nn.Embedding)",
     "Conv1D factors swapped", "gradients"),
    ("opus_bench/gradients.py", "per_feature(a * b)", "per_feature(b)", "norm weight without its input", "architectures"),
    ("opus_bench/gradients.py", "autograd.grad(losses.sum(), token", "autograd.grad(losses.mean(), token", "1/n hidden in b", "gradients"),
    ("opus_bench/layers.py", "if wanted == \"all\":", "if False:", "parameters left out of 'all' without a word", "architectures"),
    ("opus_bench/layers.py", "isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None", "False",
     "compiled models scored in silence", "architectures"),
    ("opus_bench/gradients.py", "            module.training = flag", "            pass", "training flags not restored", "selector"),
    ("opus_bench/gradients.py", "handle.remove()", "pass", "hooks left on the model", "selector"),
    ("opus_bench/gradients.py", "if len(output) == 1 < len(sequences):", "if False:", "broadcast position embedding", "gradients"),
    ("opus_bench/ghost.py", "part = (matrix[left] * right)", "part = (-matrix[left] * right)",
     "dropped sign in the contraction", "gradients"),
    ("opus_bench/ghost.py", "wide(left[:, :, start:stop])", "wide(left[:, :, : stop - start])", "wrong rows in a chunk", "gradients"),
    ("opus_bench/ghost.py", "part = (product * left).sum((1, 2))", "part = product.sum((1, 2))", "wrong contraction", "gradients"),
    ("opus_bench/ghost.py", "total = part if total is None else total + part\n    assert total is not None\n    return total\n\n\n@outside_autocast\ndef rows",
     "total = part\n    return total\n\n\n@outside_autocast\ndef rows", "second use of a tied weight lost", "gradients"),
    ("opus_bench/ghost.py", "x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x", "x",
     "half-precision factors summed in half precision", "architectures"),
    ("opus_bench/preconditioner.py", "(1 - beta1) / (1 - beta1 ** (done + 1))", "(1 - beta1)", "missing bias correction of m", "preconditioner"),
    ("opus_bench/preconditioner.py", "/ (1 - beta2**done)", "", "missing bias correction of v", "preconditioner"),
    ("opus_bench/preconditioner.py", "beta1 ** (done + 1)", "beta1 ** done", "bias correction a step late", "preconditioner"),
    ("opus_bench/preconditioner.py", 'group["momentum"] ** (2 if', 'group["momentum"] ** (1 if', "wrong scale of Muon", "preconditioner"),
    ("opus_bench/preconditioner.py", 'if group.get("amsgrad"):', "if False:", "amsgrad accepted", "preconditioner"),
    ("opus_bench/preconditioner.py", "for optimizer in optimizers for group in optimizer.param_groups for p",
     "for optimizer in optimizers for group in optimizer.param_groups[:1] for p", "only the first group", "preconditioner"),
    ("opus_bench/optimizer_map.py", "x = a * x + (b * outer + c * outer @ outer) @ x", "x = a * x + (b * outer - c * outer @ outer) @ x",
     "wrong sign in Newton-Schulz", "optimizer_map"),
    ("opus_bench/optimizer_map.py", "(v,) = torch.autograd.grad(step, g, y)", "(v,) = torch.autograd.grad(step, g, y)\n            v = -v",
     "adjoint with the wrong sign", "optimizer_map"),
    ("opus_bench/optimizer_map.py", "return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())", "return x.sqrt()",
     "infinite slope of the root at zero", "optimizer_map"),
    ("opus_bench/preconditioner.py", "+ c * outer @ outer", "- c * outer @ outer", "wrong sign in the polynomial", "preconditioner"),
    ("opus_bench/preconditioner.py", "self.diagonal[start : start + rows.shape[1]]", "self.diagonal[: rows.shape[1]]",
     "diagonal of the wrong rows", "preconditioner"),
    ("opus_bench/sketch.py", "return bucket, 1 - 2 * (bits & 1)", "return bucket, 1 + 0 * bits", "signs dropped", "sketch"),
    ("opus_bench/sketch.py", "hash_coordinates(start, start + x.shape[1]", "hash_coordinates(0, x.shape[1]", "offset of a chunk lost", "sketch"),
    ("opus_bench/sketch.py", "z = (index + 1) * _GOLDEN + scramble(seed)", "z = index * _GOLDEN + scramble(seed)",
     "another hash", "sketch"),
    ("opus_bench/utility.py", "self.alignment - self.redundancy_weight", "self.alignment + self.redundancy_weight",
     "sign of the redundancy", "utility"),
    ("opus_bench/utility.py", "return seed + crc32(name.encode())", "return seed", "one hash for all weights", "utility"),
    ("opus_bench/utility.py", "if (utility == 0).all():", "if False:", "zero scores pass", "utility"),
    ("opus_bench/utility.py", "if (utility == utility[0]).all():", "if False:", "equal scores pass", "utility"),
    ("opus_bench/utility.py", "    if bad:", "    if False:", "NaN scores pass", "utility"),
    ("opus_bench/sampling.py", "utility.double() / temperature", "utility.double() * temperature", "temperature upside down", "sampling"),
    ("opus_bench/sampling.py", "torch.rand((), dtype=torch.float64, generator=generator)", "torch.rand((), dtype=torch.float64)",
     "global RNG", "sampling"),
    ("opus_bench/sampling.py", "p.cumsum(0) <= uniform", "p.cumsum(0) <= 1 - uniform * 0.5", "wrong inverse distribution", "sampling"),
    ("opus_bench/sampling.py", "marginal(draws.indices).double()[left]", "marginal([]).double()[left]", "redundancy not brought up to date", "sampling"),
    ("opus_bench/sampling.py", "target = effective_share * len(u)", "target = effective_share * len(u) + 1", "off-by-one effective sample size", "sampling"),
    ("opus_bench/selector.py", 'power = 2 if self.redundancy == "paper" else 1', "power = 1", "eta instead of eta squared", "selector"),
    ("opus_bench/selector.py", "scale[k] ** 2 for k", "scale[k] for k", "layer scale once in the redundancy", "selector"),
    ("opus_bench/selector.py", "as_sequences(state.proxy).window(self.window)", "as_sequences(state.proxy)",
     "window not applied to the proxy", "selector"),
    ("opus_bench/selector.py", "gradients = capture(state.model, window, names, self.label_shift)", "gradients = capture(state.model, window, names)",
     "label shift not given to candidates", "selector"),
    ("opus_bench/selector.py", "self._measured_curvature(state, gradients, p, proxy_batch) / size",
     "self._measured_curvature(state, gradients, p, proxy_batch)", "curvature not divided by the size", "selector"),
    ("opus_bench/selector.py", 'if self.preconditioner == "adjoint":', "if False:", "adjoint asked for and not used", "selector"),
    ("opus_bench/selector.py", 'if self.preconditioner == "identity":', "if False:", "identity asked for and not used", "selector"),
    ("opus_bench/selector.py", "state.step % self.proxy_every == 0", "False", "proxy never refreshed", "selector"),
    ("opus_bench/train.py", "candidates.take(selection.indices.sort().values)", "candidates.take(selection.indices)",
     "order of picking changes the sum", "train"),
    ("opus_bench/train.py", "nn.utils.clip_grad_norm_(model.parameters(), clip)", "pass", "no clipping", "train"),
    ("opus_bench/train.py", "        set_schedule(optimizers, progress.step, config)\n", "", "no schedule", "train"),
    ("opus_bench/train.py", "stream.candidates(progress.step)", "stream.candidates(progress.step + 1)", "stream off by one", "train"),
    ("opus_bench/train.py", "    if not torch.isfinite(loss):", "    if False:", "NaN loss trains on", "train"),
    ("opus_bench/checkpoint.py", '        generator.set_state(state["generator"])\n', "", "sampling RNG not resumed", "train"),
    ("opus_bench/checkpoint.py", '            optimizer.load_state_dict(saved)', "            pass", "optimizer state not resumed", "train"),
    ("opus_bench/checkpoint.py", '        selector.load_state_dict(state["selector"])\n', "", "selector state not resumed", "train"),
    ("opus_bench/model.py", "first * cos + second * sin, second * cos - first * sin", "first * cos - second * sin, second * cos - first * sin",
     "rotation that is none", "model"),
    ("opus_bench/model.py", "scale=self.scale", "scale=None", "attention scale", "model"),
    ("opus_bench/model.py", "7.5 * math.sqrt(self.config.hidden_size)", "7.5", "soft cap without the width", "model"),
    ("opus_bench/model.py", "    layer.starts_at_zero = True\n", "", "output projections not zero at first", "model"),
    ("baselines/greats.py", "{k: e**2 for k, e in eta.items()}", "eta", "redundancy with one rate", "greats"),
    ("baselines/greats.py", "sampling.greedy(utility.marginal, size)", "sampling.top_k(utility.marginal, size)", "no redundancy in the choice", "greats"),
    ("opus_bench/stream.py", "size=self.size, p=self.shares)", "size=self.size)", "domains of the pool proxy drawn evenly", "corpus"),
    ("opus_bench/validation/validate.py", "torch.outer(dot, dot) - 2 * shared", "torch.outer(dot, dot) + 0 * shared",
     "a term of the stated variance lost", "validate"),
    ("opus_bench/validation/noise_injection.py", "above = clean[:, None] > noise", "above = clean[:, None] < noise", "AUC upside down", "noise_injection"),
    ("opus_bench/validation/selection_entropy.py", "math.tanh(d / 4)", "math.tanh(d / 8)", "bound on the total variation", "selection_entropy"),
    ("opus_bench/validation/muon_map.py", "mean = gradients.mean(0)", "mean = gradients.sum(0)", "derivative at another place", "muon_map"),
    ("opus_bench/validation/utility_validity.py", '"H = I": {1: alignment, 2: -redundancy}', '"H = I": {1: alignment, 2: redundancy}',
     "sign of the redundancy of a step", "utility_validity"),
    ("opus_bench/validation/noise_budget.py", "return max(0.0, 1 - rank_correlation(x, y))", "return max(0.0, 1 + rank_correlation(x, y))",
     "loss of rank upside down", "noise_budget"),
    ("baselines/perplexity.py", '"high": losses, "low": -losses', '"high": -losses, "low": losses', "high and low swapped", "baselines"),
    ("baselines/quality.py", "1 - self.kept_share", "self.kept_share", "keeps the wrong share", "baselines"),
    ("baselines/quality.py", "np.ones(len(target)), np.zeros(len(others))", "np.zeros(len(target)), np.ones(len(others))",
     "classes swapped", "baselines"),
    ("opus_bench/proxy.py", "np.maximum(best, (documents", "np.minimum(best, (documents", "smallest cosine", "proxy"),
    ("opus_bench/embedding.py", "encode = self.model.encode_query if query else", "encode = self.model.encode_document if query else",
     "no prefix before queries", "proxy"),
    ("opus_bench/embedding.py", "rows[torch.argsort(torch.tensor(order))]", "rows", "embeddings in the order of lengths", "proxy"),
    ("opus_bench/scored_pool.py", '("id", "ascending"), ("file"', '("id", "descending"), ("file"', "ties by the last id", "proxy"),
    ("opus_bench/scored_pool.py", "tokens)) + 1", "tokens))", "the document that reaches the budget is lost", "proxy"),
    ("opus_bench/scored_pool.py", "_best([*([best] if best else []), *waiting], rule.tokens, number), []", "_best(waiting, rule.tokens, number), []",
     "best of the last documents alone", "proxy"),
    ("opus_bench/scored_pool.py", "if rule.per_file:", "if False:", "per file is global", "proxy"),
    ("opus_bench/scored_pool.py", "                if not path.exists():\n", "                if True:\n", "chunks are scored again", "proxy"),
    ("opus_bench/scored_pool.py", "if table.schema.metadata[DIGEST].decode() != digests[-1]:", "if False:", "a changed pool passes", "proxy"),
    ("opus_bench/scored_pool.py", "key / rule.temperature + noise", "key / rule.temperature", "a sample without noise", "proxy"),
    ("opus_bench/scored_pool.py", "if (document.row, document.id) != (record[\"row\"], record[\"id\"]):", "if False:",
     "texts of other documents are written", "proxy"),
    ("opus_bench/proxy_items.py", '("test" if task.has_test_docs() else "validation")', '"test"',
     "evaluated validation items are not warned of", "proxy"),
    ("opus_bench/documents.py", ".shard(num_shards=shards, index=shard)", "", "every shard holds the whole data set", "proxy"),
    ("baselines/quality.py", "self.scores / self.temperature + noise", "self.scores + noise", "temperature of the subset ignored", "scorers"),
    ("baselines/dsir.py", "dsir = _package(target, pool, buckets, shortest)", "dsir = _package(pool, target, buckets, shortest)",
     "target and pool swapped", "scorers"),
    ("baselines/fast_text.py", "1 - found if self.complement else found", "found", "Ultra-FineWeb upside down", "scorers"),
    ("baselines/raters.py", "add_special_tokens=False", "add_special_tokens=True", "special tokens rated", "scorers"),
    ("baselines/raters.py", "total[n] += len(ids) * row\n                length[n] += len(ids)", "total[n] += row\n                length[n] += 1",
     "windows of one weight", "scorers"),
    ("baselines/perplexity.py", 'losses if self.keep == "high" else -losses', '-losses if self.keep == "high" else losses',
     "direction of the reference loss", "scorers"),
    ("baselines/pipeline.py", "range(rank, len(files), world_size)", "range(len(files))", "every task scores every file", "scorers"),
    ("baselines/random.py", "torch.randperm(n, generator=generator)", "torch.arange(n)", "not random", "baselines"),
    ("opus_bench/streamed.py", "total[part] = torch.stack(sums).sum(0)", "total[part] = torch.stack(sums)[0]",
     "one weight's alignment alone", "streamed"),
    ("opus_bench/streamed.py", "features[name][part] += found", "features[name][part] = found", "uses of a tied weight overwritten", "streamed"),
    ("opus_bench/streamed.py", "features[name][part] += found", "features[name][: len(found)] += found",
     "microbatches added up", "streamed"),
    ("opus_bench/streamed.py", "total[part] += sign * sample_losses", "total[part] += sample_losses", "sum instead of difference", "streamed"),
    ("opus_bench/streamed.py", "/ (2 * eps)", "/ eps", "central difference doubled", "streamed"),
    ("opus_bench/streamed.py", "alpha=c, out=p", "alpha=abs(c), out=p", "both losses on the same side", "streamed"),
    ("benchmarks/tried.py", "(sign[0][:, None] * sign[1]).to(g)", "sign[0][:, None].to(g)", "proxy sketched with other signs", "scoring"),
    ("benchmarks/tried.py", "parameters = {k: w for k, w in problem.scored()[1].items() if int(k.split(\".\")[1]) >= first}",
     "parameters = {k: w for k, w in problem.scored()[1].items() if int(k.split(\".\")[1]) > first}", "a block left out", "scoring"),
    ("benchmarks/variants.py", "use.right[chosen]", "use.right[sorted(chosen)]", "factors of other samples", "scoring"),
    ("opus_bench/streamed.py", "p.copy_(before[name])\n        torch.clear", "pass\n        torch.clear", "weights not restored", "streamed"),
    ("opus_bench/streamed.py", "        torch.clear_autocast_cache()  # an", "        pass  # an", "autocast's stale copies of the weights", "streamed"),
    ("opus_bench/gradients.py", "return grads[0], None, None, None", "return grads[0] * 2, None, None, None", "the tap is not the identity", "gradients"),
    ("opus_bench/utility.py", "proxy_gradient[name][start : start + dense.shape[1]]", "proxy_gradient[name][: dense.shape[1]]",
     "alignment from the wrong rows", "utility"),
    ("benchmarks/literal.py", "crc32(name.encode())", "len(name.encode())", "literal tables that do not depend on the weight's name", "literal"),
    ("reproduce/counts.py", "gram = 2 * n * n * shape.block_parameters", "gram = 2 * n * shape.block_parameters", "Gram counted once a sample", "overhead"),
    ("opus_bench/significance.py", "np.arange(len(p), 0, -1)", "len(p)", "Bonferroni in place of Holm", "significance"),
    ("opus_bench/significance.py", "(abs(d) - d * d) / n", "(abs(d) + d * d) / n", "least standard error too large", "significance"),
    ("opus_bench/significance.py", "abs(difference) / sd * math.sqrt(n)", "abs(difference) / sd * n", "noncentrality without the root", "significance"),
    ("opus_bench/significance.py", "gained + lost - (gained - lost) ** 2 / n", "gained + lost", "paired variance without its mean", "significance"),
    ("reproduce/printed.py", "return abs(self.gap) > 1", "return abs(self.gap) > 2", "bound of rounding doubled", "audit"),
    ("reproduce/printed.py", "sign = -1 if self.is_loss else 1", "sign = 1", "ranks of losses upside down", "audit"),
    ("reproduce/claims.py", "BEYOND if high <= alpha", "BEYOND if low <= alpha", "least noise taken for all noise", "audit"),
    ("reproduce/claims.py", "if key not in seen:", "if True:", "pairs printed twice count twice", "audit"),
    ("reproduce/headlines.py", "or m.endswith(tag)", "or True", "Random of another corpus", "audit"),
    ("opus_bench/tables.py", "HOLM_MARK if row.label in survivors else MARK", "HOLM_MARK", "mark of Holm without Holm", "report"),
    ("opus_bench/site_pages.py", ' or text.startswith(NOT_RUN) or column.startswith("the paper\'s")', ' or text.startswith(NOT_RUN)',
     "the paper's numbers stand on our runs", "site"),
    ("opus_bench/site_pages.py", "bearing = [r for r in chosen if label_of(r) in wanted]", "bearing = list(chosen)",
     "a row opens every method's runs", "site"),
    ("opus_bench/site_pages.py", '{"html": False}', '{"html": True}', "HTML of a record is markup", "site"),
    ("opus_bench/site_pages.py", "optimizer = optimizer_of(column) or next(", "optimizer = next(",
     "columns of an optimizer open both", "site"),
    ("opus_bench/site.py", 'text.replace("<", r"\\u003c")', "text", "a record ends the script element", "site"),
    ("opus_bench/site.py", 'str(config["seed"] + 1)', 'str(config["seed"])', "the replay stops before its seed", "site"),
    ("opus_bench/site_figures.py", "    if tag not in ELEMENTS:", "    if False:", "scripts of a figure let through", "site"),
    ("opus_bench/site_summary.py", "if interval.mean < 0 else", "if interval.mean > 0 else", "less and more exchanged", "site"),
    ("opus_bench/figure_values.py", "down = figure.get_figheight() * 72 - places[:, 1]", "down = places[:, 1]",
     "values of a figure upside down", "site"),
    ("opus_bench/site.py", "state = where or", "state = where and", "older records not said to be", "site"),
    ("opus_bench/checkpoint.py", "if altered is not None:", "if False:", "weights altered on disk are used", "faults"),
    ("opus_bench/checkpoint.py", 'os.replace(path, beside(path, ".previous"))', "pass", "no earlier checkpoint kept", "faults"),
    ("opus_bench/checkpoint.py", "os.replace(one, aside)", "pass", "a damaged checkpoint takes the place of the one before", "faults"),
    ("opus_bench/checkpoint.py", "        temporary.unlink(missing_ok=True)", "        pass", "half a checkpoint left on a full disk", "faults"),
    ("opus_bench/train.py", "if not math.isfinite(norm):", "if False:", "NaN gradient reaches the weights", "train"),
    ("opus_bench/train.py", "if not math.isfinite(value):", "if False:", "NaN validation loss kept as a number", "train"),
    ("opus_bench/train.py", "    if note is not None and note not in progress.notes:", "    if False:", "record silent about memory that ran out", "faults"),
    ("opus_bench/streamed.py", "microbatch = size // 2", "microbatch = size - 1", "microbatch not halved", "faults"),
    ("opus_bench/selector.py", '"fitting": self._fitting}', '"fitting": None}', "a resumed run tries again what did not fit", "faults"),
    ("opus_bench/archives.py", 'if place.anchor or ".." in place.parts:', 'if ".." in place.parts:', "absolute members accepted", "safe_loading"),
    ("opus_bench/archives.py", "file.read(info.file_size)", "file.read()", "a zip that lies about its sizes takes the memory", "safe_loading"),
    ("opus_bench/archives.py", "_check_size(self.path, self.file.tell() + size, self.limit)", "pass", "unbounded headers of a tar", "safe_loading"),
    ("opus_bench/archives.py", "_check_size(self.path, position, self.limit)", "pass", "unbounded members of a tar", "safe_loading"),
    ("opus_bench/archives.py", "kind in (0, stat.S_IFREG, stat.S_IFDIR)", "True", "links in a zip accepted", "safe_loading"),
    ("reproduce/training.py", "half_written.unlink()", "pass", "half a record left after a kill", "faults"),
    ("reproduce/runner.py", "remove_checkpoints(options.results", "str(options.results", "checkpoint of a finished run left after a kill", "faults"),
    ("opus_bench/report.py", "os.replace(temporary, path)", "Path(path).write_text(temporary.read_text())", "README lost when writing breaks off", "faults"),
    ("baselines/quality.py", "zipfile.BadZipFile)", "ZeroDivisionError)", "damaged scores end in a traceback", "safe_loading"),
    ("opus_bench/paper_suite.py", "[total / length for total, length in zip(nll, tokens, strict=True)]", "list(nll)", "total instead of mean over tokens", "paper_suite"),
    ("opus_bench/paper_suite.py", "if task.by_part:", "if False:", "subtasks pooled", "paper_suite"),
    ("opus_bench/tasks/paper_functions.py", 'len(doc["choices"]["text"]) == 4', "True", "any number of options", "paper_suite"),
    ("opus_bench/paper_items.py", "if not 0 <= gold < n:", "if False:", "hidden labels accepted", "paper_suite"),
    ("opus_bench/evaluate.py", "torch.float32 if model.dtype in (torch.bfloat16, torch.float16) else None", "None", "log-probabilities in bfloat16", "paper_suite"),
    ("opus_bench/samples.py", "if ours.keys() != theirs.keys():", "if False:", "other items paired", "paper_suite"),
    ("opus_bench/tables.py", 'not in (None, item.get("n_samples"))', 'not in (None, item.get("n_paper"))', "other counts hidden", "paper_suite"),
    ("opus_bench/shards.py", "(20240801, 7)", "(20240801, 1)", "version of the uint32 kind", "shards"),
    ("opus_bench/shards.py", "vocab_size <= 2**16", "vocab_size < 2**16", "65,536 entries in 32 bits", "shards"),
    ("opus_bench/shards.py", "if size != want or header[2] < 1:", "if False:", "cut shards are read", "shards"),
    ("opus_bench/shards.py", "if key in metadata and file_sha256(name) != metadata[key]:", "if False:", "changed bytes pass", "shards"),
    ("opus_bench/shards.py", "if (mask is None) != (", "if False and (", "a lost mask passes", "shards"),
    ("opus_bench/pool.py", "[rank * share : (rank + 1) * share]", "[:share]", "every rank gets the same rows", "shards"),
    ("opus_bench/pool.py", "turns = step * size + np.arange(size)", "turns = step + np.arange(size)", "buffers of two steps overlap", "shards"),
    ("opus_bench/pool.py", 'side="right") - 1', 'side="left") - 1', "sequence of the shard before", "shards"),
    ("opus_bench/pool.py", "np.cumsum(self._tokens // length)", "np.cumsum(self._tokens) // length", "sequences across shards", "shards"),
    ("opus_bench/pool.py", 'domain_rng(seed, "pool", epoch)', 'domain_rng(seed, "pool")', "every epoch in one order", "shards"),
    ("opus_bench/pool_blocks.py", "np.arange(len(ids)) >= len(prompt)", "np.arange(len(ids)) > len(prompt)", "a token of the text does not count", "web"),
    ("opus_bench/pool_blocks.py", "[*prompt, *text, self.end]", "[*prompt, *text]", "documents run into each other", "web"),
    ("opus_bench/pool_blocks.py", "job.source.columns, job.row)", "job.source.columns, 0)", "resuming from the first row", "web"),
    ("opus_bench/pool_blocks.py", "block, start, kept, characters, rows = block + 1, row, Block(job, tokenizer), 0, []", "block, start, kept, rows = block + 1, row, Block(job, tokenizer), []", "one document a block", "web"),
    ("opus_bench/pool_build.py", 'if shard["domain"] in wanted:', "if True:", "more than the goal", "web"),
    ("opus_bench/pool_build.py", "if settings.get(name) != before:", "if False:", "other settings go on with a pool", "web"),
    ("opus_bench/pool_build.py", 'check_shard(out / shard["file"], shard, digest=False)\n        except CorpusError:\n            return', "pass\n        except CorpusError:\n            return", "a block without its shards counts as finished", "web"),
    ("opus_bench/web.py", "skip(start)", "skip(0)", "rows read again", "web"),
    ("opus_bench/web.py", "revision=commit,\n", 'revision=place["revision"],\n', "files of a branch that may move", "web"),
    ("opus_bench/tokenizing.py", "    tokenizer.no_truncation()\n", "", "documents cut by the tokenizer's own setting", "web"),
    ("opus_bench/corpus_build.py", "    tokenizer.encode_special_tokens = True\n", "", "a marker inside a text ends a document", "web"),
    ("opus_bench/contamination.py", "[place : place + self.size]) == run:", "[place : place + self.size]) == run or True:", "hashes alone decide", "contamination"),
    ("opus_bench/contamination.py", "hit.documents += new.documents", "hit.documents = new.documents", "documents of the last shard alone", "contamination"),
    ("opus_bench/contamination.py", "checked = len(numbers) - short", "checked = len(numbers)", "short items count as clean", "contamination"),
]


def survives(copy: Path, mutant: tuple[str, str, str, str, str]) -> str | None:
    """Why the mutant is a problem, or None if a test failed as it should."""
    name, text, replacement, _, tests = mutant
    path = copy / name
    original = path.read_text()
    if original.count(text) < 1:
        return "its text is no longer in the file"
    path.write_text(original.replace(text, replacement, 1))
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-m", "not network", "-p", "no:cacheprovider",
                               f"tests/test_{tests}.py"], cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(original)
    if done.returncode == 0:
        return "SURVIVED"
    return None if done.returncode == 1 else f"pytest stopped with {done.returncode}: {done.stdout[-300:]}"


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in MUTANTS if word in m[0] or word in m[3]]
    problems = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "results", "__pycache__"))
        for mutant in chosen:
            started = time.monotonic()
            problem = survives(copy, mutant)
            problems += problem is not None
            print(f"{problem or 'killed':9} {time.monotonic() - started:5.1f} s  {mutant[0]}: {mutant[3]}", flush=True)
    print(f"{len(chosen) - problems} of {len(chosen)} mutants killed")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
