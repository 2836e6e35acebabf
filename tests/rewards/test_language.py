"""The share of words in a language: whole texts, mixtures, and what is no word at all.

The texts are article 1 of the Universal Declaration of Human Rights and lines of reasoning; the word lists were not
made from them.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.rewards.language import LANGUAGES, LATIN_LANGUAGES, language_share

TEXTS = {
    "en": (
        "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
        "and should act towards one another in a spirit of brotherhood.",
        "So each box weighs as much as four bricks. If seven boxes are on the lorry, we multiply and obtain the load.",
        "Hmm, that cannot be right, because the second player would simply copy the opening move.",
    ),
    "de": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
        "und sollen einander im Geist der Brüderlichkeit begegnen.",
        "Jede Kiste wiegt so viel wie vier Ziegel. Wenn sieben Kisten auf dem Laster stehen, multiplizieren wir.",
        "Hm, das kann nicht stimmen, denn der zweite Spieler würde einfach den Eröffnungszug wiederholen.",
    ),
    "fr": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
        "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
        "Chaque caisse pèse autant que quatre briques. Si sept caisses sont sur le camion, nous multiplions.",
        "Hum, cela ne peut pas être juste, car le second joueur copierait simplement le premier coup.",
    ),
    "es": (
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
        "conciencia, deben comportarse fraternalmente los unos con los otros.",
        "Cada caja pesa tanto como cuatro ladrillos. Si hay siete cajas en el camión, multiplicamos los valores.",
        "Eso no puede ser correcto, porque el segundo jugador simplemente copiaría la jugada inicial.",
    ),
    "zh": (
        "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
        "每个箱子的重量等于四块砖。如果卡车上有七个箱子，我们就相乘得到总重量。",
        "嗯，这不可能对，因为第二个玩家会直接模仿第一步。",
    ),
}
EVERY_TEXT = [(language, text) for language, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize(("language", "text"), EVERY_TEXT)
def test_a_text_belongs_to_its_language_and_to_no_other(language: str, text: str) -> None:
    shares = {other: language_share(text, other) for other in TEXTS}
    assert shares[language] >= 0.85
    assert max(share for other, share in shares.items() if other != language) <= 0.15


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(TEXTS, 2)))
def test_the_share_falls_as_another_language_takes_over(one: str, other: str) -> None:
    mine, theirs = [text.replace("\n", " ") for text in TEXTS[one]], list(TEXTS[other])
    mixes = [" ".join(mine[: 3 - k] + theirs[3 - k :]) for k in range(4)]
    shares = [language_share(mix, one) for mix in mixes]
    assert all(after < before - 0.1 for before, after in itertools.pairwise(shares))
    assert shares[0] >= 0.9
    assert shares[-1] <= 0.1


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(LATIN_LANGUAGES, 2)))
def test_a_switch_inside_a_sentence_is_seen(one: str, other: str) -> None:
    words, foreign = TEXTS[one][1].split(".")[0].split(), TEXTS[other][1].split(".")[0].split()
    share = language_share(" ".join(words + foreign), one)
    assert share == pytest.approx(len(words) / (len(words) + len(foreign)), abs=0.2)


def test_a_few_chinese_words_inside_english_count_for_what_they_are() -> None:
    share = language_share("We add the numbers 然后 check the final result 一次", "en")
    assert share == pytest.approx(8 / 10)
    assert language_share("We add the numbers 然后 check the final result 一次", "zh") == pytest.approx(2 / 10)


@pytest.mark.parametrize(
    "noise",
    [
        "x = 3 + 4 * y_1 - f(z)",
        "`the code is here`",
        "```python\nthe_value = find(the, code)\nprint(the)\n```",
        "$the = \\frac{of}{and}$ \\(we\\) \\[are\\] $$a number$$",
        "\\frac \\alpha \\text",
        "https://example.org/the/and/of",
        "<think> </answer>",
        "12 345 3.5 A B C",
        "NASA GPU",
        "camelCase snake_case x2",
    ],
)
def test_code_formulas_and_numbers_are_no_words(noise: str) -> None:
    assert language_share(noise, "en") is None
    german = TEXTS["de"][0]
    assert language_share(f"{german} {noise}", "de") == language_share(german, "de")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("четыре плюс три равно семь", "ru"),
        ("よって答えは七です。次に確認する", "ja"),
        ("그래서 답은 칠입니다", "ko"),
        ("η απάντηση είναι επτά", "el"),
        ("الجواب هو سبعة", "ar"),
        ("התשובה היא שבע", "he"),
        ("उत्तर सात है", "hi"),
        ("คำตอบคือเจ็ด", "th"),
    ],
)
def test_a_script_decides(text: str, language: str) -> None:
    assert language_share(text, language) == 1.0
    assert language_share(text, "en") == 0.0


def test_han_beside_kana_is_japanese_and_alone_chinese() -> None:
    assert language_share("答えは七", "zh") == 0.0
    assert language_share("答案是七", "ja") == 0.0


def test_words_without_a_cue_count_for_the_target() -> None:
    assert language_share("Mary Bob", "en") == language_share("Mary Bob", "de") == 1.0
    assert language_share("Mary Bob", "zh") == 0.0


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'xx' cannot be measured; languages: en, de"):
        language_share("a", "xx")


@given(st.text(), st.sampled_from(LANGUAGES))
def test_any_text_has_a_share_between_nothing_and_all(text: str, language: str) -> None:
    share = language_share(text, language)
    assert share is None or 0.0 <= share <= 1.0
