"""What cells of 01_tiny_lm cannot hold: any text, damage anywhere in a store, a store whose writing was interrupted."""
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course import tiny_lm
from llm_course.tiny_lm import SENTENCES, StoreError, TinyLM, Vocabulary, checkpointer, load_store, save_store, split_words, train, training_sequences

VOCAB = Vocabulary.from_texts(SENTENCES)
EVERY = np.array([(i, j) for i in range(13) for j in range(13)])

def predictions(model) -> np.ndarray: return model.forward(EVERY)[-1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A model, and the store with its checkpoints."
    folder, model = tmp_path_factory.mktemp('tiny')/'store', TinyLM(VOCAB, seed=1)
    train(model, training_sequences(SENTENCES, VOCAB), epochs=5, on_epoch=checkpointer(model, folder/'checkpoints', epochs=(3,)))
    save_store(model, folder)
    return model, folder

FILES = ('vocabulary.db', 'training_sequences.db', 'model.db', 'embeddings.npy', 'layer_1_weights.npy', 'layer_1_biases.npy', 'layer_2_weights.npy',
         'layer_2_biases.npy', 'model_config.json', 'checkpoints/epoch_3.ckpt', 'checkpoints/best_model.ckpt', 'data/raw_text/sentences.txt',
         'data/processed/vocabulary.json', 'data/processed/tokenized.bin')

def test_the_store_holds_these_files_and_no_other(trained):
    assert {p.relative_to(trained[1]).as_posix() for p in trained[1].rglob('*') if p.is_file()} == set(FILES)

@pytest.mark.parametrize('name', FILES)
def test_a_flipped_bit_is_refused_or_changes_nothing(trained, name, tmp_path):
    "60 places in each file. A store that is accepted must predict the same, from the model and from each checkpoint."
    model, folder = trained
    shutil.copytree(folder, tmp_path/'s')
    want, path, rng, refused = load_store(folder), tmp_path/'s'/name, np.random.default_rng(0), 0
    good = path.read_bytes()
    for at in rng.permutation(len(good))[:60]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1:])
        try: got = load_store(tmp_path/'s')
        except StoreError as e: refused += 1; assert path.name in str(e), e
        else:
            assert np.array_equal(predictions(got.model), predictions(model)) and np.array_equal(got.targets, want.targets)
            assert all(np.array_equal(predictions(c.model), predictions(want.checkpoints[n].model)) and c.at == want.checkpoints[n].at for n, c in got.checkpoints.items())
    assert refused >= (1 if name.endswith('.db') else 15)    # most of a small database is empty space

@pytest.mark.parametrize('name', FILES)
def test_a_file_cut_short_is_refused(trained, name, tmp_path):
    shutil.copytree(trained[1], tmp_path/'s')
    path = tmp_path/'s'/name
    good = path.read_bytes()
    for size in (0, 1, len(good) // 2, len(good) - 2):
        path.write_bytes(good[:size])
        with pytest.raises(StoreError, match=path.name): load_store(tmp_path/'s')

@pytest.mark.parametrize('name', [n for n in FILES if not n.startswith('checkpoints')])
def test_a_missing_file_is_named(trained, name, tmp_path):
    shutil.copytree(trained[1], tmp_path/'s')
    (tmp_path/'s'/name).unlink()
    with pytest.raises(StoreError, match='missing'): load_store(tmp_path/'s')

def test_a_file_of_another_store_is_refused(trained, tmp_path):
    save_store(TinyLM(VOCAB, seed=2), tmp_path/'other', [SENTENCES[1], *SENTENCES[:1], *SENTENCES[2:]])
    for name in FILES:
        if name.startswith('checkpoints') or 'vocabulary' in name or name == 'model_config.json': continue
        shutil.copytree(trained[1], tmp_path/'s')
        shutil.copy(tmp_path/'other'/name, tmp_path/'s'/name)
        with pytest.raises(StoreError, match='do not agree'): load_store(tmp_path/'s')
        shutil.rmtree(tmp_path/'s')

def test_a_checkpoint_of_another_vocabulary_is_refused(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path/'s')
    other = TinyLM(Vocabulary([*VOCAB.words[:-1], 'hamster']))
    tiny_lm.save_checkpoint(tmp_path/'s'/'checkpoints'/'odd.ckpt', other, tiny_lm.Epoch(1, 2., None))
    with pytest.raises(StoreError, match='odd.ckpt'): load_store(tmp_path/'s')

def test_interrupted_writing_leaves_no_store_that_is_taken_for_complete(trained, tmp_path, monkeypatch):
    "Stop after each number of files in turn, while replacing an older store."
    shutil.copytree(trained[1], tmp_path/'s')
    real, model = tiny_lm.atomic_write, TinyLM(VOCAB, seed=9)
    for allowed in range(12):
        left = [allowed]
        def stops(*args, **kw):
            left[0] -= 1
            if left[0] < 0: raise KeyboardInterrupt
            return real(*args, **kw)
        monkeypatch.setattr(tiny_lm, 'atomic_write', stops)
        try: save_store(model, tmp_path/'s')
        except KeyboardInterrupt:
            with pytest.raises(StoreError, match='model_config.json is missing'): load_store(tmp_path/'s')
    monkeypatch.setattr(tiny_lm, 'atomic_write', real)
    save_store(model, tmp_path/'s')
    assert np.array_equal(predictions(load_store(tmp_path/'s').model), predictions(model))
    assert not list((tmp_path/'s').rglob('*.tmp'))

@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_splits_into_words_that_stay_words(text):
    words = split_words(text)
    assert ''.join(words) == ''.join(text.lower().split()) or any(ch.isspace() or not ch.isprintable() for ch in text)
    for w in words: assert split_words(w) == [w]
    if words:
        v = Vocabulary.from_texts([text])
        ids = v.encode(text)
        assert [v.words[i] for i in ids] == words and v.encode(v.decode(ids)).tolist() == ids.tolist()

@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=('Cs', 'Cc', 'Zl', 'Zp')), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 4))
def test_any_text_survives_the_store(tmp_path_factory, texts, context):
    texts = [t + ' a.' for t in texts]
    model = TinyLM(Vocabulary.from_texts(texts), context=context, dim=3, hidden=5)
    folder = tmp_path_factory.mktemp('any')
    save_store(model, folder, texts)
    got = load_store(folder)
    assert got.texts == tuple(texts) and got.model.vocabulary.words == model.vocabulary.words
    for n, p in model.params.items(): assert np.array_equal(got.model.params[n], p)

def test_numbers_that_are_not_finite_are_not_stored(tmp_path):
    model = TinyLM(VOCAB)
    model.params['embeddings'][3, 1] = np.nan
    with pytest.raises(ValueError, match='embeddings holds a number that is not finite'): save_store(model, tmp_path)
    assert not list(tmp_path.iterdir())

def test_the_store_can_be_read_from_a_strange_folder(tmp_path):
    folder = tmp_path/'a folder #1 ? 100%'
    save_store(TinyLM(VOCAB), folder)
    assert load_store(folder).texts == SENTENCES
