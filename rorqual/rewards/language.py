"""Which words of a text belong to a language: the measure behind the language-consistency reward of DeepSeek-R1.

R1 rewards the share of target-language words in the chain of thought (arXiv 2501.12948, section 2.3.2). Words are
judged one by one, in their sentence:

- a script that is one language's own (Han, kana, Hangul, Cyrillic, Greek, Arabic, Hebrew, Devanagari, Thai) decides;
- among languages that share the Latin script, frequent words and spelling decide what they can; every other word
  takes the language that its neighbours in the sentence speak for.

Code, formulas, numbers, LaTeX commands, tags, single letters and short abbreviations are words of no language and are
left out.

Limits: the Latin-script languages are those in `LATIN_LANGUAGES`; a word of any other counts for the one it looks
most like. Names, loan words and single foreign words without a cue take the language of their sentence, but in a text
of another script they count against it. Han characters count as Chinese unless kana share the sentence. A sentence
without any cue counts as the target, if that has the Latin script: what cannot be told is not punished.

Shapes: W words of a sentence, L Latin-script languages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

FREQUENT_WORDS: dict[str, str] = {
    "en": """
        about after again air all along also always an and another answer any are around as asked at away back
        be because been before below between big both but by called came can check come could day did
        different divided do does don down each end equals even every few find first for found from get give
        given gives go going good got great had has have help hence her here him his home house how however
        i'm i've if in into is it it's its just know large last left let let's like line little long look
        looked made make man many may me men might minus more most mr much must my name need never new next no
        not now number of off often old on one only or other our out over own part people place plus put read
        right said same saw say second see set she should show since small so some something sound step still
        such sum take tell than that the their them then there therefore these they things think this those
        thought three through thus time times to together too total two under up us use very wait want was
        water way we we've well went were what when where which while who why will with word words work world
        would write years your
    """,
    "de": """
        aber addieren alle als also am an antwort auch auf aus bei beim bis da dabei daher damit dann das dass
        dem den denn der des deshalb dich die diese dieser dir doch dort drei durch ein eine einem einen einer
        eines er ergebnis ergibt erste es euch frage für gegen geteilt gibt gleich gut habe haben hat hatte
        hier ich ihm ihn ihnen ihr ihre im immer in ist ja jahr jahre jahren jetzt kann keine können lassen
        machen mal man mark mehr mich minus mir mit muss müssen nach nein nicht noch nun nur oder plus prüfen
        rechnen sagte schon schritt sei sein seine seiner seit sich sie sind so soll somit summe uhr um und
        uns unter viel viele vom von vor war waren warte was weil wenn werden wie wieder will wir wird wissen
        worden wurde wurden zahl zu zuerst zum zunächst zur zwei zweite zwischen über
    """,
    "fr": """
        a ajouter alors après attendez au aussi autre autres aux avait avant avec avoir bien c'est calculer
        car ce ceci cela ces cette chaque comme comment d'abord d'où dans de des deux divisé dois doit donc
        dont du elle elles en encore ensuite entre est et eux faire fait faut fois ici il ils j'ai jamais je
        l'on la le les leur leurs lui là ma maintenant mais mes moi moins mon même n'est ne nombre nos notre
        nous on ont ou où par parce pas peu peut plus pour pourquoi premier première puis qu'il qu'on quand
        que quel quelle quelles quelque quelques quels qui rien réponse résultat sa sans se ses si somme son
        sont sous sur ta tes toi ton toujours tous tout toute toutes trois trop très tu un une voici voilà vos
        votre vous vérifier y ça égal égale était étape été être
    """,
    "es": """
        ahora al algo algunas algunos allí ante antes aquí así bien cada calcular como comprobar con contra
        cual cuando cuatro da dado de debe debemos del desde después dividido donde dos durante e el ella
        ellas ellos en entonces entre era es esa ese eso espera esta estar estas este esto estos está están
        fue ha han hasta hay hemos igual la las le les lo los luego mal me mi mis mucho muchos muy más mí nada
        ni no nos nosotros nunca número o otra otras otro otros para paso pero poco por porque primero puede
        pueden pues que quien quienes qué respuesta resultado se ser si siempre siete sin sobre son su suma
        sumar sus también tanto te tenemos ti tiene tienen todo todos tres tu tus tú un una unas uno unos
        vamos veces y yo él
    """,
}
"""The words that a reader of each language meets most, and those that a calculation uses."""

LATIN_LANGUAGES = tuple(FREQUENT_WORDS)
"""Codes (ISO 639-1) of the Latin-script languages that can be told apart."""

SCRIPTS: dict[str, str] = {
    "zh": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff",
    "ja": "\u3040-\u30ff\u31f0-\u31ff",
    "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "ru": "\u0400-\u052f",
    "el": "\u0370-\u03ff\u1f00-\u1fff",
    "ar": "\u0600-\u06ff\u0750-\u077f",
    "he": "\u0590-\u05ff",
    "hi": "\u0900-\u097f",
    "th": "\u0e00-\u0e7f",
}
"""Language -> the characters of its script; other languages of the same script count for it."""

LANGUAGES = (*LATIN_LANGUAGES, *SCRIPTS)
"""Codes of all languages whose share can be measured."""

_CHARACTERS_PER_WORD = {"zh": 2.0, "ja": 2.0, "th": 4.0}
"""Scripts without spaces: about how many characters make a word, so that mixed texts are measured in words."""

_SPELLING: dict[str, str] = {
    "en": r"th|wh|ough|ight|ing$|[^aeiou]ed$|ness$|[^l]ly$|^know|^wr|sh|oo|ee|ea[^u]|ck|w[aeio]",
    "de": r"[äöüß]|sch|cht|ung$|keit$|heit$|lich|isch|^ge\w+t$|^ver|^zw|[^aeou]ieren?$|tz|pf|k[^aehilnorsuwy]|\wen$",
    "fr": r"[çèêëîïôœùûâ]|é|eau|aux$|eux$|ement$|ique$|oire?$|^qu|ions$|^[dljmnst]'|^qu'|é?es?$|ois$|ait$|ouv|eur",
    "es": (
        r"[ñáíóú]|é|ción$|dad$|mente$|ad[oa]s?$|id[oa]s?$|[ai]e?ndo$|[^aeiou]ll|^est|[aeiou]mos$|[ai]r$"
        r"|[bcdfglmnprtv][oa]s$|uev"
    ),
}
"""Language -> spelling that speaks for it. A hint only: it weighs less than a frequent word."""

_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)"
    r"|https?://\S+|\\[A-Za-z]+|</?\w+>",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"[.!?;:。！？；：\n]+")
_IDENTIFIER = re.compile(r"\w*[\d_]\w*|[a-z]+[A-Z]\w*|\w+\(")
_SCRIPT_PATTERN = "|".join(f"(?P<{language}>[{characters}]+)" for language, characters in SCRIPTS.items())
_WORD = re.compile(_SCRIPT_PATTERN + r"|(?P<latin>[A-Za-zÀ-ÖØ-öø-ɏ]+(?:['’][A-Za-zÀ-ÖØ-öø-ɏ]+)*)")

_FREQUENT = {language: frozenset(words.split()) for language, words in FREQUENT_WORDS.items()}
_SPELLED = {language: re.compile(pattern) for language, pattern in _SPELLING.items()}
_FREQUENT_WEIGHT, _SPELLING_WEIGHT, _SENTENCE_WEIGHT = 2.0, 0.5, 0.1
_NEIGHBOUR_WEIGHTS = (0.5, 0.25, 0.125)
_TIE_WEIGHT = 1e-6  # decides for the target where nothing else does


def language_share(text: str, language: str) -> float | None:
    """Share of the words of `text` that belong to `language`, in [0, 1]; None when it has no words.

    Raises: ValueError for a language outside `LANGUAGES`.
    """
    if language not in LANGUAGES:
        raise ValueError(f"The share of {language!r} cannot be measured; languages: {', '.join(LANGUAGES)}.")
    counts: defaultdict[str, float] = defaultdict(float)
    for sentence in _SENTENCE_END.split(_NOT_PROSE.sub(" ", text)):
        for found, num_words in _words_by_language(sentence, language):
            counts[found] += num_words
    total = sum(counts.values())
    return counts[language] / total if total else None


def _words_by_language(sentence: str, target: str) -> Iterator[tuple[str, float]]:
    """(language, number of words) for each word or run of characters of a sentence."""
    latin: list[str] = []
    matches = list(_WORD.finditer(_IDENTIFIER.sub(" ", sentence)))
    is_japanese = any(match.lastgroup == "ja" for match in matches)
    for match in matches:
        language = str(match.lastgroup)
        if language == "latin":
            latin.append(match.group())
            continue
        num_words = len(match.group()) / _CHARACTERS_PER_WORD[language] if language in _CHARACTERS_PER_WORD else 1.0
        yield ("ja" if is_japanese and language == "zh" else language), num_words
    words = [word for word in latin if _is_word(word)]
    for language in _latin_languages(words, target):
        yield language, 1.0


def _is_word(word: str) -> bool:
    """Whether a run of Latin letters is prose: not one letter, not a short abbreviation in capitals."""
    if len(word) == 1:
        return False
    return not (word.isupper() and len(word) <= 4 and not any(word.lower() in known for known in _FREQUENT.values()))


def _latin_languages(words: Sequence[str], target: str) -> list[str]:
    """The language of each word of a sentence: its own cues, then its neighbours', then the sentence's."""
    if not words:
        return []
    cues_WL = np.array([_cues(word.lower().replace("’", "'")) for word in words])
    scores_WL = cues_WL + _SENTENCE_WEIGHT * cues_WL.mean(axis=0)
    for distance, weight in enumerate(_NEIGHBOUR_WEIGHTS, start=1):
        scores_WL[distance:] += weight * cues_WL[:-distance]
        scores_WL[:-distance] += weight * cues_WL[distance:]
    if target in LATIN_LANGUAGES:
        scores_WL[:, LATIN_LANGUAGES.index(target)] += _TIE_WEIGHT
    return [LATIN_LANGUAGES[best] for best in scores_WL.argmax(axis=1)]


@lru_cache(maxsize=50_000)
def _cues(word: str) -> tuple[float, ...]:
    """How strongly a word speaks for each Latin-script language; a frequent word of several speaks for each in part."""
    owners = [word in _FREQUENT[language] for language in LATIN_LANGUAGES]
    if any(owners):
        return tuple(_FREQUENT_WEIGHT * owns / sum(owners) for owns in owners)
    return tuple(_SPELLING_WEIGHT * bool(_SPELLED[language].search(word)) for language in LATIN_LANGUAGES)
