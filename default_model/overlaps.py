"""Nouns that may be true of one and the same thing, so that a thing is never called absent by another of its names.

The nouns are those of objects.csv, of imagenet.csv, and the plain shapes.
"""

from __future__ import annotations


def _lines(text: str) -> list[str]:
    """The lines of a table; one that ends with a comma goes on in the next."""
    return [" ".join(line.split()) for line in text.strip().replace(",\n", ", ").split("\n")]


def noun_groups(text: str) -> tuple[frozenset[str], ...]:
    """One group a line: "boat, sailboat, ship"."""
    return tuple(frozenset(line.split(", ")) for line in _lines(text))


def noun_stars(text: str) -> dict[str, frozenset[str]]:
    """One noun a line, with those that belong to it but not to each other: "hat: cap, cowboy hat"."""
    pairs = (line.split(": ") for line in _lines(text))
    return {noun: frozenset(others.split(", ")) for noun, others in pairs}


def linked(groups: tuple[frozenset[str], ...], stars: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """For each noun those that share a group or a star's line with it."""
    links: dict[str, set[str]] = {}
    for group in groups:
        for noun in group:
            links.setdefault(noun, set()).update(group)
    for noun, others in stars.items():
        links.setdefault(noun, set()).update(others)
        for other in others:
            links.setdefault(other, set()).add(noun)
    return {noun: frozenset(others) for noun, others in links.items()}


# A general word, and what it is true of as well.
GENERAL = noun_stars("""
    bird: albatross, blackbird, chick, chicken, crane, crow, duck, eagle, flamingo, goose, guinea fowl, hawk,
        heron, hummingbird, lark, magpie, ostrich, owl, parrot, peacock, pelican, penguin, pigeon, quetzal,
        rooster, seagull, stork, swallow, swan, toucan, turkey, vulture
    fish: clownfish, eel, goldfish, lionfish, pufferfish, seahorse, shark, stingray
    insect: ant, bee, beetle, butterfly, caterpillar, cicada, cockroach, cricket, dragonfly, fly, grasshopper,
        ladybug, mantis, moth, stick insect, wasp
    beetle: ladybug
    bear: panda, polar bear
    deer: reindeer
    sheep: lamb
    pig: wild boar, warthog
    lizard: chameleon, iguana
    chicken: chick, rooster
    flower: daffodil, daisy, hibiscus, marigold, rose, sunflower, thistle, tulip
    tree: christmas tree, palm tree
    berry: blueberry, raspberry, strawberry
    squash: pumpkin, zucchini
    pepper: chili pepper
    bread: bagel, croissant
    cake: birthday cake, cupcake
    dessert: birthday cake, cake, cookie, cupcake, doughnut, ice cream, pie, popsicle, pudding
    candy: candy cane, chocolate, lollipop
    sandwich: hamburger, hot dog
    drink: beer, coffee, wine
    egg: easter egg
    hat: cap, cowboy hat, elf hat, graduation cap, hard hat, propeller hat, santa hat, sombrero, top hat,
        wizard hat
    cap: graduation cap, shower cap, swim cap
    helmet: football helmet, hard hat, knight helmet
    mask: gas mask, oxygen mask
    shoe: boot, high heel, sandal, sneaker
    sock: stocking
    bag: backpack, handbag, plastic bag
    glove: boxing glove, mitten
    shirt: sweatshirt, t-shirt
    swimsuit: bikini, swim trunks
    tie: bow tie
    bow: bow tie
    glasses: sunglasses
    pants: jeans
    armor: knight helmet
    car: jeep, limousine, race car, taxi
    truck: cement truck, dump truck, fire truck, garbage truck, snowplow, tow truck
    boat: canoe, sailboat, ship
    airplane: fighter jet
    balloon: hot air balloon
    house: cabin, igloo, mobile home
    tower: lighthouse, water tower
    tent: circus tent, tepee
    road sign: stop sign
    computer: laptop
    telephone: cell phone
    clock: stopwatch
    box: crate, toolbox
    chest: toolbox
    chair: throne, wheelchair
    book: comic book
    saw: chainsaw
    drum: drum kit
    knife: letter opener
    puzzle: crossword puzzle, puzzle piece
    cart: wheelbarrow
""")

# Names between which people, and the model, are not sure: one of them may be used for what another one is meant for.
OVERLAPS = noun_groups("""
    circle, oval
    square, rectangle, diamond
    diamond, gem
    circle, spiral
    boat, sailboat, ship, submarine, canoe, shipwreck
    ship, oil rig, construction crane
    chicken, rooster, chick, turkey
    roast turkey, chicken, turkey
    duck, goose, swan, albatross, seagull, pelican
    crane, heron, stork, flamingo, ostrich, pelican
    crow, blackbird, magpie, lark, swallow, pigeon
    eagle, hawk, vulture, owl, kite
    bat, bird, owl
    parrot, toucan, quetzal
    turkey, guinea fowl, peacock
    hummingbird, swallow, bee, moth
    sheep, lamb, goat
    goat, antelope, deer, reindeer, gnu
    llama, camel, sheep, giraffe
    bull, cow, bison, yak, gnu, water buffalo
    horse, donkey, zebra, unicorn
    cheetah, leopard, jaguar
    tiger, lion, cougar, cheetah, cat, lynx, leopard, jaguar
    dog, wolf, fox, coyote, hyena
    bear, panda, polar bear, red panda, sloth
    raccoon, red panda, lemur, badger, skunk
    weasel, ferret, otter, mongoose, meerkat, badger, marmot, squirrel, beaver
    beaver, marmot, otter, capybara, platypus, wombat, guinea pig
    mouse, rat, hamster, guinea pig
    porcupine, hedgehog, echidna
    chimpanzee, monkey, gorilla, gibbon, orangutan, lemur
    koala, wombat, bear, kangaroo
    hippo, rhino, pig, elephant
    pig, wild boar, warthog
    seal, sea lion, dugong, otter
    dolphin, orca, whale, shark, fish, dugong
    crocodile, alligator, lizard, iguana
    lizard, chameleon, iguana, salamander, axolotl, dinosaur, dragon
    frog, salamander
    snake, worm, eel, caterpillar, sea cucumber, slug
    crab, lobster, crayfish, shrimp, scorpion, spider
    snail, slug, shell
    shell, starfish, sea urchin, sea anemone, coral, fossil, woodlouse
    sea anemone, jellyfish, octopus, coral, sea cucumber, mushroom
    coral, coral reef
    fossil, skull, dinosaur, woodlouse
    fish, goldfish, clownfish, lionfish, pufferfish, stingray, eel
    bee, wasp, fly, ant
    butterfly, moth
    grasshopper, cricket, cicada, mantis, stick insect
    mantis, stick insect, dragonfly
    beetle, ladybug, cockroach, cicada, cricket, tick
    spider, tick, ant
    centipede, worm, caterpillar, scorpion
    caterpillar, worm
    honeycomb, beehive
    thistle, artichoke, flower
    daisy, sunflower, marigold, daffodil, flower
    leaf, holly, clover
    acorn, chestnut, walnut, almond, pecan
    acorn, pinecone
    berry, holly, tomato, apple
    orange, apricot, peach, lemon, lime, mango
    plum, cherry, peach, apple, grapes, fig
    jackfruit, custard apple, pineapple, artichoke
    pomegranate, apple, onion, tomato
    watermelon, squash, cucumber
    pear, avocado, apple, fig, mango
    cucumber, zucchini, pepper, squash, eggplant, chili pepper
    cabbage, lettuce, broccoli, cauliflower
    potato, ginger, garlic, onion
    pumpkin, jack-o-lantern, squash
    dough, bread, mashed potatoes
    burrito, taco, sandwich, hot dog
    meatloaf, cake, bread
    pie, pizza, cake
    cookie, cake, waffle, bread
    soup, pasta, guacamole
    guacamole, avocado, mashed potatoes
    bread, hamburger, bagel, doughnut, pretzel
    chocolate, dessert, ice cream, cake, cookie, pudding
    cup, drinking glass, wine glass, kettle, teapot, pitcher, bottle, jug, coffee pot, coffee maker, vase, bowl
    cup, beaker, measuring cup, bucket
    drink, cup, drinking glass, wine glass, bottle
    beer, wine, drinking glass, wine glass, bottle, cup
    coffee, cup, coffee maker, coffee pot, chocolate
    milk can, bottle, jug, bucket, barrel
    cocktail shaker, bottle, cup, salt shaker, pepper grinder
    bottle, baby bottle, hairspray, lotion, perfume, sunscreen
    pot, frying pan, wok, kettle, slow cooker, coffee pot, teapot
    mashed potatoes, potato, french fries
    corn, popcorn
    bagel, croissant, bread
    carousel, ferris wheel
    cloth, paper towels
    bow, knot
    door, gate
    ceiling, dome, roof
    cowboy hat, sombrero, top hat
    trash can, recycling bin, bucket, barrel
    vase, pot, potted plant, bowl
    bowl, plate, tray, wok, pot, mortar and pestle, soup
    strainer, bowl, ladle
    spoon, spatula, ladle, fork, knife
    can opener, corkscrew, nutcracker
    toaster, microwave, waffle iron, stove, rotisserie
    stove, fireplace, radiator, heater
    washing machine, dishwasher, fridge, microwave
    fridge, vending machine, cabinet
    vending machine, slot machine, atm, gas pump, parking meter, telephone
    bed, couch, blanket, pillow, crib, sleeping bag
    cabinet, dresser, wardrobe, bookshelf, chest, desk
    table, desk, bench
    bookshelf, library, store
    chair, couch, throne
    altar, church
    toilet paper, paper towels
    sink, bathtub
    broom, mop, paintbrush, rake
    rug, doormat, towel, blanket
    curtain, window shade, window
    fan, windmill, pinwheel
    lighter, matchstick, candle, torch, fire
    light bulb, lamp, flashlight, spotlight
    lotion, sunscreen, perfume, hairspray, soap dispenser, makeup, lipstick
    bandage, cloth
    clock, watch, stopwatch, compass, barometer, speedometer, scale
    chain, necklace, whistle, safety pin
    hook, safety pin, nail, screw
    screw, nail, screwdriver, bottle cap
    buckle, safety pin, padlock
    padlock, key, safe
    envelope, package, gift, box, crate
    box, plastic bag, package
    basket, crate, bucket, chest
    basket, crib
    suitcase, chest, box, toolbox
    handbag, suitcase, backpack, bag, wallet, basket
    wallet, pencil case, book
    pen, pencil, marker, letter opener, feather, syringe
    pencil, ruler, tape measure
    pencil case, pencil sharpener, eraser
    book, menu, website, envelope
    plaque, gravestone, statue
    monitor, television, laptop, computer, website
    keyboard, laptop, typewriter, piano
    cell phone, ipod, calculator, remote control, telephone
    camera, lens cap, binoculars, telescope, projector
    speaker, radio, cassette player, cd player, modem, hard drive
    disc, hard drive, cd player
    cassette, ipod
    printer, photocopier, projector
    oscilloscope, radio, television, monitor
    hockey puck, lens cap
    joystick, computer mouse
    microscope, telescope
    magnifying glass, glasses
    sunglasses, glasses
    tripod, telescope, camera
    moon, planet, sun, globe
    star, snowflake, sun
    airplane, fighter jet, airplane wing, space shuttle, missile
    rocket, missile, space shuttle, bullet, bomb
    rocket, moon lander
    parachute, hot air balloon, balloon, blimp, kite, umbrella
    flying saucer, blimp
    satellite, satellite dish, solar panel
    bicycle, tricycle, motorcycle, scooter, unicycle
    train, train car, streetcar, bus
    car, van, taxi, jeep, limousine, race car, truck, golf cart, go-kart, camper
    van, bus, camper, truck, ambulance
    truck, tow truck, fire truck, garbage truck, dump truck, cement truck, snowplow, ambulance,
        amphibious vehicle
    tank, amphibious vehicle, truck, tractor, cannon
    tractor, combine harvester, farm machine, bulldozer, forklift, lawn mower, plow, snowplow
    cement mixer, cement truck
    cart, rickshaw, wheelbarrow, shopping cart, wheelchair, farm machine
    sled, snowmobile, skis, skateboard
    mobile home, camper, house
    construction crane, forklift, tower, oil rig
    wheel, disc brake
    baseball, tennis ball, golf ball, croquet ball, ping-pong ball, volleyball, soccer ball, basketball
    football, rugby ball
    gymnast, dancer
    barbell, dumbbell
    tennis racket, paddle
    trophy, cup
    guitar, violin, cello, banjo, harp
    oboe, bassoon, flute, pan flute, ocarina, whistle, harmonica
    trumpet, trombone, french horn, saxophone, bassoon
    drum, drum kit, drumstick, cymbal, gong, xylophone
    maraca, drumstick
    piano, organ, accordion
    shirt, t-shirt, jacket, sweatshirt, sweater, coat, vest, uniform
    jacket, suit, coat, uniform, cloak, robe
    tie, bow tie
    suit, groom
    dress, skirt, robe, kimono, apron, cloak, pajamas
    robe, pajamas, kimono
    poncho, cloak, scarf, cloth, sweater
    scarf, feather boa, cloth
    wool, sweater, scarf, hat, cloth
    mitten, glove, sock
    sock, stocking, shoe
    boot, high heel, sneaker, sandal, shoe
    jeans, pants, pajamas
    swimsuit, bikini, bra, swim trunks
    hat, helmet, cap, wig, crown
    shower cap, swim cap
    helmet, hard hat, knight helmet, armor, mask
    armor, shield, sword, vest, uniform
    bib, apron, diaper
    santa claus, santa hat, elf hat
    hair clip, bow, safety pin
    sword, knife, letter opener
    axe, hammer, shovel
    drill, hair dryer, gun
    hammer, screwdriver, wrench, pliers
    saw, chainsaw, hand plane
    bow and arrow, harp
    house, cabin, barn, castle, fort, tower, church, igloo, palace, monastery, mosque, temple, planetarium,
        boathouse, sawmill
    castle, palace, monastery, cliff dwelling, wall, fort
    dome, mosque, planetarium, church, palace, igloo
    temple, pyramid, tower, church, palace
    roof, barn, house, cabin, birdhouse, boathouse
    arch, bridge, gate, pier
    pier, dock, bridge, seawall, beach
    dam, bridge, wall, seawall
    wall, fence, gate, railing
    birdhouse, mailbox, beehive
    lighthouse, tower, water tower, windmill, church
    obelisk, tower, pedestal, statue, totem pole, stone monument, gravestone, cross, plaque
    pole, flag, maypole, torch, totem pole, road sign
    traffic light, road sign, stop sign, parking meter
    fountain, well, geyser, statue
    store, bakery, restaurant, barbershop, library
    stage, movie theater
    beach, lake, seawall, cliff, field
    mountain, volcano, valley, cliff, cave
    valley, field, lake
    fire, volcano, fireplace, candle
    cloud, geyser
    rainbow, cloud
    bell, gong, wind chime
    potted plant, cactus, flower, palm tree
    cannon, gun
    ice cream, popsicle, lollipop
    apple, custard apple
    chair, bench, swing
    book, binder
    cloth, handkerchief, towel, scarf, blanket, curtain
    clock, hourglass, sundial
    gate, turnstile
    airplane, helicopter
    christmas tree, tree
    ornament, bubble
    bubble, balloon
    wreath, holly, christmas tree
    cross, church, gravestone
    egg, easter egg
    teddy bear, bear, doll
    doll, teddy bear, scarecrow
    rubber duck, duck, chick
    punching bag, bag
    gas mask, oxygen mask, mask, snorkel, helmet
    stretcher, bed, wheelchair
    neck brace, bandage
    crutch, pole
    piggy bank, pig
    knot, chain
    spiral, knot, shell, railing
    abacus, xylophone, calculator
    sewing machine, typewriter
    gas cylinder, bottle
    pole, railing
    man, doctor, nurse, scientist, police officer, firefighter, astronaut, dancer, mermaid, groom, scuba diver,
        gymnast, baseball player
""")

_SAME = linked(OVERLAPS, GENERAL)


def same_thing(noun: str, other: str) -> bool:
    """Whether one thing might be called by both nouns: "sheep" and "lamb", "hat" and "top hat"."""
    return noun == other or other in _SAME.get(noun, frozenset())
