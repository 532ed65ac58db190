"""Forward plus backward of our `GPT` against transformers, with the same weights, the same batch and the same loss: the GPT-2 recipe
against `GPT2LMHeadModel`, the Llama recipe against `LlamaForCausalLM`, both as they are and through torch.compile.

Before anything is timed, the logits of both sides are compared and must agree. The sides alternate in one run. Reported are medians over the
rounds, medians of the ratios within a round (to transformers in the same mode) with a 95 % bootstrap interval, and the fastest round, which other work on the machine
disturbs least. The time that torch.compile takes is in the first call, which is not part of the medians.
"""
import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llm_course.core import generator
from llm_course.gpt import GPT, GPTConfig

Step = Callable[[], float]


def gpt2_weights(state: dict) -> dict:
    "Weights of `GPT2LMHeadModel` under our names: its matrices are transposed, its queries, keys and values are one."
    ours = {'embed.weight': state['transformer.wte.weight'], 'head.weight': state['transformer.wte.weight'], 'pos_embed.weight': state['transformer.wpe.weight']}
    parts = {'attn.c_proj': 'attn.o_proj', 'mlp.c_fc': 'mlp.up_proj', 'mlp.c_proj': 'mlp.down_proj', 'ln_1': NORMS[0], 'ln_2': NORMS[1]}
    for name, p in state.items():
        name, kind = name.removeprefix('transformer.').rsplit('.', 1)
        if name == 'ln_f': ours[f'norm.{kind}'] = p
        if not name.startswith('h.'): continue
        _, i, part = name.split('.', 2)
        p = p.T if p.dim() == 2 else p
        if part == 'attn.c_attn': ours |= {f'blocks.{i}.attn.{which}_proj.{kind}': chunk for which, chunk in zip('qkv', p.chunk(3))}
        else: ours[f'blocks.{i}.{parts[part]}.{kind}'] = p
    return ours

def llama_weights(state: dict) -> dict:
    "Weights of `LlamaForCausalLM` under our names."
    def rename(name: str) -> str:
        for old, new in {'self_attn.': 'attn.', 'input_layernorm': NORMS[0], 'post_attention_layernorm': NORMS[1], 'model.embed_tokens': 'embed',
                         'model.layers': 'blocks', 'model.norm': 'norm', 'lm_head': 'head'}.items(): name = name.replace(old, new)
        return name
    return {rename(name): p for name, p in state.items()}

# the names of the two norms of a block, read off a model
NORMS = list(dict.fromkeys(n.split('.')[2] for n in GPT(GPTConfig(8, 8, 1, 1, 8)).state_dict() if n.startswith('blocks') and 'norm' in n.split('.')[2]))

def gpt2_pair(a: argparse.Namespace) -> tuple[GPT, torch.nn.Module]:
    "Our GPT-2 recipe and that of transformers, with the weights of the latter."
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=a.vocab, n_positions=a.seq_len, n_embd=a.d_model, n_layer=a.layers, n_head=a.heads, attn_pdrop=0, embd_pdrop=0,
                                        resid_pdrop=0, bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation='sdpa'))
    ours = GPT(GPTConfig.from_name('gpt2', vocab_size=a.vocab, max_seq_len=a.seq_len, n_layer=a.layers, n_head=a.heads, d_model=a.d_model))
    ours.load_state_dict(gpt2_weights(theirs.state_dict()))
    return ours, theirs

def llama_pair(a: argparse.Namespace) -> tuple[GPT, torch.nn.Module]:
    "Our Llama recipe, one key head for each three query heads or for all, and that of transformers, with the weights of the latter."
    from transformers import LlamaConfig, LlamaForCausalLM
    kv = a.heads // 3 if a.heads % 3 == 0 else 1
    ours = GPT(GPTConfig(vocab_size=a.vocab, max_seq_len=a.seq_len, n_layer=a.layers, n_head=a.heads, n_kv_head=kv, d_model=a.d_model, tie_embeddings=False))
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=a.vocab, max_position_embeddings=a.seq_len, hidden_size=a.d_model, num_hidden_layers=a.layers, num_attention_heads=a.heads,
                                          num_key_value_heads=kv, intermediate_size=ours.config.d_ff, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False, attn_implementation='sdpa'))
    ours.load_state_dict(llama_weights(theirs.state_dict()))
    return ours, theirs

def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    "Logits (B, T, V) of either side."
    out = model(ids)
    return out[0] if isinstance(out, tuple) else out.logits

def assert_equal(ours: GPT, theirs: torch.nn.Module, ids: torch.Tensor) -> float:
    "The largest difference of the logits; raises if it exceeds 1e-4."
    with torch.no_grad(): gap = (logits_of(ours, ids) - logits_of(theirs, ids)).abs().max().item()
    if not gap < 1e-4: raise AssertionError(f'the logits differ by {gap}: the two sides are not the same model')
    return gap

def make_step(model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> Step:
    "Forward, cross-entropy, backward. Returns the loss."
    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits_of(model, ids).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.item()
    return step

def seconds(step: Step) -> float:
    "Wall-clock seconds of one call."
    start = time.perf_counter(); step()
    return time.perf_counter() - start

def measure(pair: tuple[GPT, torch.nn.Module], a: argparse.Namespace) -> tuple[dict, dict, float]:
    "Seconds of each side in each round, seconds until the first compiled step was done, and the largest difference of the logits."
    rows = torch.randint(a.vocab, (a.batch, a.seq_len + 1), generator=generator(0))
    ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    gap, (ours, theirs) = assert_equal(*pair, ids[:2]), (m.train() for m in pair)
    steps = {'ours': make_step(ours, ids, targets), 'transformers': make_step(theirs, ids, targets)}
    if a.compile: steps |= {'ours, compiled': make_step(torch.compile(ours), ids, targets), 'transformers, compiled': make_step(torch.compile(theirs), ids, targets)}
    first = {name: seconds(step) for name, step in steps.items()}              # warms up, and compiles
    losses = {name: step() for name, step in steps.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    times = {name: [] for name in steps}
    for i in range(a.rounds):
        order = list(steps) if i % 2 == 0 else list(steps)[::-1]               # nobody always runs after the same neighbour
        for name in order: times[name].append(seconds(steps[name]))
    return times, first, gap

def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    "The 95 % bootstrap interval of the median."
    r, picks = torch.tensor(ratios), torch.randint(len(ratios), (draws, len(ratios)), generator=generator(0))
    low, high = r[picks].median(dim=1).values.quantile(torch.tensor([.025, .975])).tolist()
    return low, high

def table(times: dict[str, list[float]], first: dict[str, float], tokens: int) -> str:
    "A Markdown table: median and fastest step, and speed against transformers in the same mode: the median of the ratios within a round with its interval, and the ratio of the fastest."
    lines = ['| side | ms a step, median | fastest | tokens/s | speed against transformers | 95 % interval | of the fastest | first call, s |', '|:--|--:|--:|--:|--:|--:|--:|--:|']
    for name, ts in times.items():
        against = times[name.replace('ours', 'transformers')]
        ratios = [b / t for t, b in zip(ts, against)]
        low, high = interval(ratios)
        lines.append(f'| {name} | {1e3 * statistics.median(ts):.0f} | {1e3 * min(ts):.0f} | {tokens / statistics.median(ts):,.0f} | {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} | {min(against) / min(ts):.2f} | {first[name]:.1f} |')
    return '\n'.join(lines)

def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, about in (('rounds', 9, 'how often the sides alternate'), ('batch', 8, 'rows'), ('seq_len', 256, 'tokens in a row'), ('layers', 6, 'blocks'),
                                 ('heads', 6, 'query heads'), ('d_model', 384, 'width'), ('vocab', 8192, 'tokens of the vocabulary'), ('threads', 2, 'threads of PyTorch')):
        parser.add_argument('--' + name.replace('_', '-'), type=int, default=default, help=f'{about} (default {default})')
    parser.add_argument('--family', choices=['gpt2', 'llama', 'both'], default='both', help='which recipe (default both)')
    parser.add_argument('--no-compile', dest='compile', action='store_false', help='leave torch.compile out')
    parser.add_argument('--out', help='also write the tables to this file')
    a = parser.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    import transformers
    text = (f'Forward, cross-entropy and backward; {a.layers} layers, {a.heads} heads, width {a.d_model}, vocabulary {a.vocab}, batch {a.batch} x {a.seq_len}, float32, dropout 0; '
            f'{a.rounds} rounds; {platform.machine()}, {a.threads} threads, PyTorch {torch.__version__}, transformers {transformers.__version__} with sdpa\n')
    for family, pair in (('gpt2', gpt2_pair), ('llama', llama_pair)):
        if a.family not in (family, 'both'): continue
        models = pair(a)
        times, first, gap = measure(models, a)
        text += (f'\n**{family}**, {sum(p.numel() for p in models[0].parameters()):,} parameters; the logits of both sides differ by at most {gap:.0e}\n\n'
                 + table(times, first, a.batch * a.seq_len) + '\n')
    print(text)
    if a.out:
        with open(a.out, 'w', encoding='utf-8') as f: f.write(text)

if __name__ == '__main__': main()
