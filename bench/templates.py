"""The templates and slots of the domains in `bench.traffic`."""

CODE_SYSTEM = "You are a Python coding assistant. Answer with one short function in a code block and nothing else."
CODE = (
    "Write a Python function that returns the sum of the {attr} of a list of {things}.",
    "Write a Python function that returns the average {attr} of a list of {things}.",
    "Write a Python function that finds the highest {attr} in a list of {things}.",
    "Write a Python function that finds the lowest {attr} in a list of {things}.",
    "Write a Python function that sorts a list of {things} by {attr}.",
    "Write a Python function that counts the {things} whose {attr} is greater than a limit.",
    "Write a Python function that removes all {things} whose {attr} is zero.",
    "Write a Python function that groups {things} by {attr} in a dictionary.",
    "Write a Python function that returns the {things} whose {attr} is even.",
    "Write a Python function that doubles the {attr} of every item in a list of {things}.",
    "Write a Python function that checks whether all {things} have the same {attr}.",
    "Write a Python function that returns a dictionary from the name of {things} to their {attr}.",
    "Write a Python function that prints the name and {attr} of each of the {things}.",
    "Write a Python function that returns the first three {things} with the largest {attr}.",
    "Write a Python function that returns the difference between the largest and smallest {attr} of {things}.",
    "Write a Python function that returns the median {attr} of a list of {things}.",
    "Write a Python function that filters {things} by a minimum and a maximum {attr}.",
    "Write a Python function that adds a {attr} to every dictionary in a list of {things}.",
    "Write a Python function that returns the total {attr} of {things} with recursion.",
    "Write a Python function that returns the set of distinct {attr} values of {things}.",
    "Write a Python function that converts the {attr} of a list of {things} to strings.",
    "Write a Python function that returns the index of the item with the smallest {attr} in {things}.",
)
CODE_SLOTS = {
    "attr": (
        "price", "weight", "age", "length", "score", "size", "height", "volume", "rating", "duration", "distance", "width",
    ),
    "things": (
        "books", "cars", "orders", "students", "products", "songs", "players", "files", "boxes", "houses", "planets",
        "tickets", "movies", "animals", "invoices", "routes",
    ),
}  # fmt: skip

FRENCH_SYSTEM = "Réponds en français."
FRENCH_EXAMPLE = (
    "Le manteau acheté mardi est trop petit.",
    "Bonjour,\n\nMerci pour votre message. Nous sommes désolés pour le manteau. Nous allons vous rembourser.\n\n"
    "Cordialement,\nLe service client",
)
FRENCH = (
    "Je voudrais retourner {item} que j'ai acheté {when}.",
    "Bonjour, {item} que j'ai commandé {when} n'est pas encore arrivé.",
    "Bonjour, {item} que j'ai reçu {when} est cassé. Que faire ?",
    "Comment puis-je obtenir un remboursement pour {item} acheté {when} ?",
    "Je veux annuler ma commande de {when} pour {item}.",
    "Pouvez-vous m'envoyer la facture pour {item} acheté {when} ?",
    "Je voudrais échanger {item} reçu {when} contre un autre modèle.",
    "Bonjour, {item} acheté {when} ne fonctionne plus.",
    "Quelle est la garantie pour {item} acheté {when} ?",
    "Il manque une pièce avec {item} livré {when}.",
    "J'ai reçu {when} un autre article, mais pas {item}.",
    "J'ai payé deux fois {item} {when}.",
    "Je souhaite changer l'adresse de livraison pour {item} commandé {when}.",
    "Où est {item} que j'ai commandé {when} ?",
    "Bonjour, {item} reçu {when} n'est pas de la bonne couleur.",
    "Bonjour, {item} reçu {when} est trop petit. Puis-je le renvoyer ?",
    "Le prix pour {item} a baissé depuis que je l'ai acheté {when}.",
    "Comment utiliser {item} que j'ai reçu {when} ?",
    "Je n'ai pas reçu de confirmation pour {item} commandé {when}.",
    "Je suis très content : {item} acheté {when} est parfait. Merci !",
    "Le livreur a laissé {item} chez un voisin {when}.",
    "Puis-je faire réparer {item} acheté {when} ?",
)
FRENCH_SLOTS = {
    "item": (
        "le téléphone", "le manteau", "le livre", "l'ordinateur", "le vélo", "le canapé", "le sac", "l'aspirateur",
        "le casque", "le bureau", "le parapluie", "le miroir", "le fauteuil", "le tapis",
    ),
    "when": (
        "hier", "lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "la semaine dernière", "le mois dernier",
        "il y a trois jours", "il y a dix jours", "en janvier", "en mars", "en juin",
    ),
}  # fmt: skip

MATHS_SYSTEM = "You are a maths tutor. Solve the problem step by step in short sentences and end with the answer."
MATHS = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "{name} has {a} {things} and gives {b} of them away. How many {things} are left?",
    "{name} packs {a} {things} into each of {b} boxes. How many {things} are there in all?",
    "{name} shares {a} {things} among {b} friends. How many {things} does each friend get?",
    "{name} earns {a} dollars an hour and works {b} hours. How much does {name} earn?",
    "{name} reads {a} pages a day for {b} days. How many pages does {name} read?",
    "{name} drives {a} miles an hour for {b} hours. How far does {name} drive?",
    "{name} buys {a} {things} at {b} dollars each. How much does {name} pay?",
    "{name} has {a} {things}. {name} loses {b} and then finds 5 more. How many {things} does {name} have?",
    "{name} sells {a} {things} on Monday and {b} on Tuesday. How many {things} were sold in total?",
    "{name} saves {a} dollars a week for {b} weeks. How much does {name} save?",
    "{name} plants {b} rows with {a} trees in each row. How many trees are there?",
    "{name} had {a} {things} and ate {b} of them. How many {things} are left?",
    "{name} collects {a} {things} every day. How many {things} after {b} days?",
    "{name} needs {a} {things} and already has {b}. How many more {things} are needed?",
    "{name} runs {b} laps of {a} metres each. How many metres does {name} run?",
    "{name} bakes {a} cakes and cuts each of them into {b} pieces. How many pieces are there?",
    "{name} has {a} {things}, and Sam has {b} more than {name}. How many {things} does Sam have?",
    "{name} has {a} {things}, and Sam has {b} fewer than {name}. How many {things} does Sam have?",
    "{name} pays {a} dollars for a ticket and {b} dollars for food. How much is spent in total?",
    "{name} fills {b} bottles with {a} millilitres each. How many millilitres is that?",
    "{name} has {b} shelves with {a} {things} on each. How many {things} are there?",
)
MATHS_SLOTS = {
    "name": ("Anna", "Ben", "Clara", "David", "Emma", "Leo", "Maria", "Tom"),
    "a": ("24", "36", "48", "60", "72"),
    "b": ("2", "3", "4", "6", "12"),
    "things": ("apples", "books", "marbles", "pens", "cards", "cookies", "coins", "stickers"),
}

JSON_SYSTEM = "You extract data and answer with JSON only."
JSON_EXAMPLE = (
    "Tom Hill of Oslo ordered 4 cups.",
    '{\n  "name": "Tom Hill",\n  "city": "Oslo",\n  "item": "cups",\n  "quantity": 4\n}',
)
JSON = (
    "{name} from {city} ordered {n} {things}.",
    "Please send {n} {things} to {name} in {city}.",
    "{name}, who lives in {city}, wants to buy {n} {things}.",
    "An order came in: {n} {things} for {name}, {city}.",
    "{city}: {name} asks for {n} {things}.",
    "We shipped {n} {things} to {name} at the address in {city}.",
    "{name} called from {city} about {n} {things}.",
    "The customer {name} of {city} returns {n} {things}.",
    "{n} {things} were delivered in {city} to {name}.",
    "Invoice for {name}, {city}: {n} {things}.",
    "{name} bought {n} {things} in our shop in {city}.",
    "Reserve {n} {things} for {name} from {city}.",
    "From {city}, {name} writes that {n} {things} are missing.",
    "{name} has cancelled the {n} {things} for {city}.",
    "Deliver to {city}: {n} {things}, attention of {name}.",
    "{name} would like {n} {things}, sent to {city}.",
    "In {city}, {name} picked up {n} {things}.",
    "{n} {things} are on their way to {name} in {city}.",
    "{name} paid for {n} {things}; the shop is in {city}.",
    "Add {n} {things} to the order of {name} ({city}).",
)
JSON_SLOTS = {
    "name": ("Anna Berg", "Ben Carter", "Clara Diaz", "David Evans", "Emma Fox"),
    "city": ("Boston", "Denver", "London", "Paris", "Madrid"),
    "n": ("2", "3", "5", "12"),
    "things": ("chairs", "lamps", "desks", "phones", "books", "shirts"),
}
