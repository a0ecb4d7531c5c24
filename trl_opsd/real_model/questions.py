"""Easy questions, for answers that are to become shorter. None of them is asked to see what a model still knows."""

# Templates, each with what fills it and the answers, with other words for these after a slash
_ASKED: dict[str, str] = {
    "What is the capital of {}?": "Portugal: Lisbon, Greece: Athens, Austria: Vienna, Poland: Warsaw, Norway: Oslo, "
    "Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen, Ireland: Dublin, Hungary: Budapest, "
    "Belgium: Brussels, Egypt: Cairo, Kenya: Nairobi, Cuba: Havana, Peru: Lima, Canada: Ottawa, Mexico: Mexico City, "
    "Argentina: Buenos Aires, China: Beijing, Thailand: Bangkok, India: New Delhi/Delhi, South Korea: Seoul, "
    "Turkey: Ankara, Ukraine: Kyiv/Kiev, Iraq: Baghdad, Iran: Tehran, Australia: Canberra, England: London, Scotland: "
    "Edinburgh",
    "On which continent is {}?": "Brazil: South America, Germany: Europe, India: Asia, Nigeria: Africa, Canada: North "
    "America, Japan: Asia, France: Europe, Kenya: Africa, Argentina: South America, Spain: Europe, Italy: Europe, "
    "Mexico: North America, Vietnam: Asia, Morocco: Africa, Peru: South America, Poland: Europe",
    "Which language do most people in {} speak?": "France: French, Germany: German, Japan: Japanese, Brazil: "
    "Portuguese, Mexico: Spanish, England: English, Italy: Italian, Russia: Russian, Greece: Greek, Egypt: Arabic, "
    "Sweden: Swedish, Poland: Polish, Turkey: Turkish, Australia: English, Argentina: Spanish, Austria: German",
    "What is the opposite of {}?": "fast: slow, dark: light/bright, old: young/new, rich: poor, happy: sad/unhappy, "
    "full: empty, wet: dry, loud: quiet/silent/soft, heavy: light, high: low, open: closed/shut/close, left: right, "
    "day: night, strong: weak, early: late, soft: hard, clean: dirty, true: false, good: bad/evil, tall: short",
    "What colour is {}?": "the sky on a clear day: blue, a ripe banana: yellow, blood: red, coal: black, a ripe "
    "tomato: red, milk: white, a carrot: orange, gold: gold/golden/yellow, an emerald: green, chocolate: brown",
    "What is a young {} called?": "dog: puppy/pup, cat: kitten, cow: calf, sheep: lamb, horse: foal, goat: kid, duck: "
    "duckling, frog: tadpole, lion: cub, hen: chick",
    "Which planet is {}?": "the largest in the solar system: Jupiter, the closest to the Sun: Mercury, known for its "
    "rings: Saturn, called the red planet: Mars, the hottest in the solar system: Venus, the farthest from the Sun: "
    "Neptune",
    "Which chemical element has the symbol {}?": "O: oxygen, H: hydrogen, C: carbon, N: nitrogen, Fe: iron, Au: gold, "
    "Ag: silver, He: helium, Na: sodium, Ca: calcium",
    "What do you call somebody who {}?": "bakes bread: baker, flies planes: pilot, teaches children: teacher, paints "
    "pictures: painter/artist, writes books: writer/author, repairs pipes: plumber, treats teeth: dentist, grows "
    "crops: farmer, plays the piano: pianist, puts out fires: firefighter/fireman, cuts hair: barber/hairdresser, "
    "takes photographs: photographer, drives a taxi: driver/taxi driver, designs buildings: architect",
    "Who wrote {}?": "Hamlet: Shakespeare, Don Quixote: Cervantes, War and Peace: Tolstoy, Pride and Prejudice: "
    "Austen, Oliver Twist: Dickens, the Odyssey: Homer, Frankenstein: Shelley, Moby-Dick: Melville, 1984: Orwell, "
    "Dracula: Stoker",
    "How many {}?": "hours does a day have: 24/twenty-four, seconds does a minute have: 60/sixty, legs does a dog "
    "have: four/4, sides does a triangle have: three/3, letters does the English alphabet have: 26/twenty-six, "
    "wheels does a bicycle have: two/2, days does a year have: 365, sides does a square have: four/4, legs does an "
    "insect have: six/6, continents are there: seven/7",
}


def questions() -> list[tuple[str, list[str]]]:
    """All questions, each with the words of which an answer names one."""
    asked = []
    for template, pairs in _ASKED.items():
        for pair in pairs.split(", "):
            filling, _, answers = pair.rpartition(": ")
            asked.append((template.format(filling), answers.split("/")))
    return asked
