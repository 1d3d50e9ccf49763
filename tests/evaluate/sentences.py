"""Sentences as in captions, and odder ones, to compare tokenizers on. The same for the same seed."""

from __future__ import annotations

import random

_NOUNS = [
    "man", "woman", "dog", "cat", "bus", "train", "pizza", "table", "street", "dog's", "children", "men's",
    "skateboard", "t-shirt", "teddy", "bear", "cell", "phone", "fire", "hydrant", "stop", "sign", "frisbee",
    "surfboard", "wine", "glass", "parking", "meter", "traffic", "light", "hot", "dog", "co-worker",
    "two-year-old", "jack-o'-lantern", "merry-go-round", "self-portrait", "X-ray", "U-turn", "tee-ball",
    "half-pipe", "OK", "O'Hare", "McDonald's", "Coca-Cola",
]  # fmt: skip
_VERBS = [
    "sits", "stands", "is", "isn't", "aren't", "doesn't", "can't", "cannot", "won't", "rides", "holding",
    "gonna", "wanna", "gotta", "eats", "flies", "waiting", "looks", "couldn't", "hasn't", "he's", "it's",
    "they're", "we've", "I'm", "she'll", "you'd", "that's", "there's", "who's", "let's", "ain't",
    "shouldn't've", "y'all",
]  # fmt: skip
_SMALL = [
    "a", "an", "the", "on", "in", "at", "of", "with", "and", "or", "next", "to", "near", "by", "under",
    "over", "behind", "beside", "for", "from", "into", "A", "An", "The", "And", "In", "On", "I", "it",
    "its", "his", "her", "two", "three", "2", "3", "10", "very", "some", "many", "no", "not", "as", "he",
    "she", "they", "He", "She", "It", "There", "This", "That", "While",
]  # fmt: skip
_COLOURS = [
    "red", "blue", "green", "black-and-white", "multi-colored", "brown", "grey", "gray", "colour",
    "off-white", "dark-blue", "red/white",
]  # fmt: skip
_ODD = [
    "'quoted'", '"quoted"', "'q'", '"q"', "``tex''", "`tick`", "“curly”", "‘curly’", "«guillemets»", "it’s",
    "dogs’", "don’t", "n't", "'em", "'til", "'cause", "rock'n'roll", "o'clock", "ma'am", "'90s", "90's",
    "1990s", "1990's", "'50", "5'10\"", "6ft", "6'", '2"', "1/2", "3/4", "1/2-inch", "½", "2½", "¾",
    "1,000", "1,000,000.50", "3.14", ".5", "5.", "$5", "$5.00", "5$", "US$5", "£20", "€9.99", "50¢", "50%",
    "100°F", "20°", "#1", "#tag", "@user", "No.", "no.", "12:30", "5:30pm", "5", "p.m.", "7", "a.m.", "7am",
    "A.M.", "12/25/2010", "2010-12-25", "25.12.2010", "1-2-3", "555-1234", "555-123-4567", "(555)",
    "123-4567", "1.800.555.1234", "1st", "2nd", "42nd", "10x10", "4x4", "747", "B-52", "F-16", "737-800",
    "A380", "v1.2", "1.2.3", "Mr.", "Mrs.", "Dr.", "St.", "Ave.", "Rd.", "Blvd.", "Inc.", "Co.", "Corp.",
    "Ltd.", "Jr.", "Sr.", "vs.", "vs", "etc.", "e.g.", "i.e.", "U.S.", "U.S.A.", "U.K.", "D.C.", "N.Y.",
    "L.A.", "J.K.", "a.k.a.", "approx.", "ft.", "in.", "lb.", "oz.", "Mt.", "Ft.", "fig.", "Jan.", "Feb.",
    "Sept.", "Dec.", "Mon.", "Fri.", "Calif.", "Mass.", "Miss.", "Ill.", "Ariz.", "www.example.com",
    "example.org", "http://example.com/a?b=c", "https://x.org/a_(b).", "me@example.com", "a.b@c.d.org",
    "file.jpg", "IMG_1234.JPG", "photo.png", "caption.txt", "AT&T", "R&B", "M&M's", "B&B", "Q&A", "a&b",
    "&", "&amp;", "&quot;hi&quot;", "&lt;b&gt;", "<b>", "</b>", "<br/>", "<3", ":)", ":-)", ";)", ":(",
    ":D", "=)", "<unk>", "[UNK]", "[a]", "{b}", "(c)", "(see", "left)", ")", "(", "-", "--", "---", "----",
    "–", "—", "…", "...", "..", "....", ".", ",", ";", ":", "!", "?", "!!", "?!", "??", "!!!", "/", "\\",
    "|", "_", "__", "*", "**", "***", "+", "=", "==", "~", "^", "#", "##", "@", "%", "$", "<", ">", "<<",
    ">>", "and/or", "he/she", "w/", "w/o", "b/w", "24/7", "black/white/red", "on/off/on/off", "mid-air",
    "half-", "-up", "a-", "-b", "well-lit", "up-to-date", "state-of-the-art", "one-of-a-kind", "café",
    "naïve", "jalapeño", "crème", "brûlée", "façade", "Zürich", "Ærøskøbing", "señor", "piñata", "résumé",
    "co-op", "Beyoncé", "éclair", "日本", "寿司", "한국", "москва", "ελλάδα", "שלום", "مرحبا", "😀", "🐶dog", "❤",
    "♥", "★", "→", "•", "·", "©", "®", "™", "°", "²", "³", "x²", "H₂O", "×", "÷", "±", "¿qué?", "¡hola!",
    "C#", "C++", "F#", "Wi-Fi", "wi-fi", "iPhone", "eBay", "YouTube", "3D", "3-D", "2D", "HDTV", "TV's",
    "PCs", "CD's", "DVDs", "L'Oreal", "l'eau", "d'Avignon", "O'Brien", "D'Angelo", "c'est", "Pty.", "Ltd.",
    "non-U.S.", "U.S.-U.K.", "'n'", "fish'n'chips", "fish", "'n'", "chips", "li'l", "ol'", "goin'",
    "somethin'", "Dunkin'", "Cap'n", "y'know", "dunno", "lemme", "gimme", "'tis", "'twas", "more'n", "d'ye",
    "who'd've", "I'd've", "mustn't", "needn't", "rock-n-roll", "x-men", "pro-", "anti-", "ex-",
    "1-800-FLOWERS", "10-15", "10–15", "5-10%", "-5", "+5", "±5", "5-year-old", "20-something", "9/11",
    "7-Eleven", "7/11", "1-1/2", "10ft.", '6"', "5'6", "snake_case", "CamelCase", "ALLCAPS", "a.b.c", "x.y",
    "end.Next", "one.two", "stop!go", "why?not", "yes/no.", "he,she", "a;b", "a:b", "5,6", "1:2",
    "6:00-7:00",
]  # fmt: skip
_NONSENSE = "abcdeNSTstmrv'.,-/:;!?\"()&$#*_ 0123459 ’“”–…éñ\xad\xa0"
_ENDS = (
    ".", ".", ".", "", "", " .", "!", "?", "...", ". ", " ", '."', '".', ".'", ".)", "!!", ";", ",", " - ",
    "…", "  ",
)  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` sentences: seven of ten plain captions, the others with odd words, odd marks or plain nonsense."""
    random_ = random.Random(seed)
    return [_sentence(random_) for _ in range(count)]


def _sentence(random_: random.Random) -> str:
    kind = random_.random()
    words = []
    for _ in range(random_.randint(4, 14)):
        pool = random_.choice((_SMALL, _NOUNS, _NOUNS, _VERBS, _COLOURS, _SMALL))
        word = random_.choice(pool)
        if kind > 0.6 and random_.random() < 0.3:
            word = random_.choice(_ODD)
        if kind > 0.5 and random_.random() < 0.08:
            word += random_.choice(
                (",", ";", ":", ".", "!", "?", "'", '"', ")", "'s", "’s", "-", "...", ',"', ".com")
            )
        if kind > 0.8 and random_.random() < 0.08:
            word = random_.choice(("(", '"', "'", "“", "‘", "-", "$", "#", "@", "`", "[")) + word
        if kind > 0.97 and random_.random() < 0.3:
            word = "".join(random_.choice(_NONSENSE) for _ in range(random_.randint(1, 8)))
        if random_.random() < 0.02:
            word = word.upper()
        words.append(word)
    text = (" " if random_.random() < 0.97 else "  ").join(words)
    if random_.random() < 0.7:
        text = text[:1].upper() + text[1:]
    return text + random_.choice(_ENDS)
