"""Which language a value of a language column means: `en`, `en-US`, `eng_Latn` and `English` are one.

One idea: a table of 80-odd languages (ISO 639-1, the three-letter codes that data sets write, English name, own name),
and one rule for the rest: a well-formed code that the table does not know is a language, its own, and a word that it
does not know is nothing. Region and script are passed over; nothing is guessed from likeness.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

# code, three-letter codes (also of the individual language that data sets mean by it), names; '_' is a space
_TABLE = """
af afr afrikaans | am amh amharic አማርኛ | ar ara arb arabic standard_arabic modern_standard_arabic العربية
as asm assamese | az aze azj azerbaijani | be bel belarusian | bg bul bulgarian български | bn ben bengali bangla বাংলা
bs bos bosnian | ca cat catalan català | ceb cebuano | cs ces cze czech čeština | cy cym wel welsh | da dan danish dansk
de deu ger german deutsch | el ell gre greek ελληνικά | en eng english | eo epo esperanto
es spa spanish español castilian | et est ekk estonian eesti | eu eus baq basque euskara
fa fas per pes persian farsi iranian_persian western_persian فارسی | fi fin finnish suomi | fil filipino
fr fra fre french français | ga gle irish | gl glg galician galego | gu guj gujarati ગુજરાતી | ha hau hausa
he heb hebrew עברית | hi hin hindi हिन्दी हिंदी | hr hrv croatian hrvatski | ht hat haitian haitian_creole
hu hun hungarian magyar | hy hye arm armenian | id ind indonesian bahasa_indonesia | ig ibo igbo
is isl ice icelandic | it ita italian italiano | ja jpn japanese 日本語 | jv jav javanese | ka kat geo georgian
kk kaz kazakh | km khm khmer | kn kan kannada | ko kor korean 한국어 | ky kir kyrgyz | la lat latin | lo lao
lt lit lithuanian lietuvių | lv lav lvs latvian latviešu standard_latvian | mg mlg plt malagasy plateau_malagasy
mi mri mao maori | mk mkd mac macedonian | ml mal malayalam | mn mon khk mongolian | mr mar marathi मराठी
ms msa may zsm malay standard_malay | mt mlt maltese | my mya bur burmese | ne nep npi nepali
nl nld dut dutch nederlands flemish | no nor nb nob nn nno norwegian norwegian_bokmål bokmål nynorsk norwegian_nynorsk
pa pan punjabi panjabi | pl pol polish polski | ps pus pbt pashto | pt por portuguese português
ro ron rum romanian română | ru rus russian русский | sd snd sindhi | si sin sinhala sinhalese
sk slk slo slovak | sl slv slovenian slovene | sn sna shona | so som somali | sq sqi alb als albanian
sr srp serbian српски | su sun sundanese | sv swe swedish svenska | sw swa swh swahili kiswahili | ta tam tamil தமிழ்
te tel telugu తెలుగు | tg tgk tajik | th tha thai ไทย | tl tgl tagalog | tr tur turkish türkçe
uk ukr ukrainian українська | ur urd urdu اردو | uz uzb uzn uzbek northern_uzbek
vi vie vietnamese tiếng_việt | xh xho xhosa | yo yor yoruba | yue cantonese
zh zho chi cmn chinese mandarin mandarin_chinese simplified_chinese traditional_chinese 中文 | zu zul zulu
"""
# codes that say that nobody knows, that there are several, or that there is none; and how tables write a hole
_NONE = frozenset({"und", "unk", "mul", "mis", "zxx", "xx", "xxx", "na", "nan", "nil"})
_CODE = re.compile(r"([a-z]{2,3})(?:-[a-z0-9]{1,8})*")


def known_language(value: object) -> str | None:
    """The one code of the language that a value names, or None where it names none.

    >>> [known_language(v) for v in ("en-US", "ENG", "French", "arb_Arab", "tpi", "Klingon", "und", None)]
    ['en', 'en', 'fr', 'ar', 'tpi', None, None, None]
    """
    if not isinstance(value, str):
        return None
    text = " ".join(value.split()).casefold()
    if (named := _names().get(text)) is not None:
        return named
    match = _CODE.fullmatch(text.replace("_", "-"))
    if match is None or match[1] in _NONE:
        return None
    return _names().get(match[1], match[1])


def match_language(value: object, languages: Sequence[str]) -> str | None:
    """The one of `languages` (codes) that a value names, or None where it names none of them.

    >>> match_language("Arabic", ["en", "ar"]), match_language("pt-BR", ["en", "ar"])
    ('ar', None)

    The code as it stands wins, so that `ar` and `arb` can both be asked for.
    """
    if isinstance(value, str) and (text := value.strip().casefold()) in languages:
        return text
    known = known_language(value)
    return None if known is None else next((code for code in languages if known_language(code) == known), None)


@cache
def _names() -> dict[str, str]:
    table = (entry.split() for line in _TABLE.strip().splitlines() for entry in line.split(" | "))
    return {name.replace("_", " "): code for code, *names in table for name in (code, *names)}
