"""The fixed texts on which two tokenizers are compared. Changing them changes recorded figures."""

from __future__ import annotations

#: ASCII prose, digits, whitespace, code, and several scripts; order and content are part of the figure's meaning.
SAMPLES: tuple[str, ...] = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "It's 5 o'clock; we'll see what they've done, won't we?",
    "A model that was not run is not published.",
    "UPPER lower CamelCase snake_case kebab-case",
    "email@example.org https://example.org/path?query=1&other=2#part",
    "0",
    "12+7=",
    "1234567890",
    "3.14159 -273.15 1e-9 0x7F 50% $9.99",
    "2024-11-05T23:59:59Z",
    "1,000,000 (one million)",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "tab\tseparated\tvalues",
    "line one\nline two\n\nline four\n",
    "\n",
    "def quantize(path: Path) -> bytes:\n    return path.read_bytes()  # float32\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    '{"key": [1, 2.5, null, true], "nested": {"text": "\\"quoted\\""}}',
    "SELECT name, size FROM artifacts WHERE size > 1024 ORDER BY name;",
    '<p class="note">Bread &amp; butter</p>',
    "Über den Wolken muß die Freiheit wohl grenzenlos sein.",
    "Le cœur a ses raisons que la raison ne connaît point.",
    "El niño comió piñas en el otoño.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок.",
    # Greek on purpose, not Latin look-alikes.
    "Η γρήγορη καφέ αλεπού.",  # noqa: RUF001
    "השועל החום המהיר",
    "الثعلب البني السريع",
    "तेज़ भूरी लोमड़ी",
    "敏捷的棕色狐狸跳过了懒狗。",
    "いろはにほへと ちりぬるを",
    "다람쥐 헌 쳇바퀴에 타고파",
    "สวัสดีชาวโลก",
    "emoji: 🙂 👩‍🚀 🇫🇷",
    "∑ xᵢ² ≤ ∞ → ½ ± µ",
)
