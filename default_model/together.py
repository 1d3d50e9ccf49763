"""What may be on a photograph besides its main thing, so that it is never asked about as absent.

Of a composed scene everything is known and `overlaps.same_thing` is enough; of a photograph the main thing alone is.
"""

from __future__ import annotations

from default_model.overlaps import linked, noun_groups, noun_stars, same_thing

# What is photographed together: rooms, places, activities.
TOGETHER = noun_groups("""
    desk, table, chair, computer, monitor, keyboard, computer mouse, laptop, website, speaker, headphones,
        microphone, printer, photocopier, modem, hard drive, disc, cd player, joystick, projector, television,
        telephone, cell phone, calculator, remote control, radio, fan, lamp, light bulb, cabinet, bookshelf,
        book, binder, envelope, package, pen, pencil, marker, ruler, scissors, eraser, cup, bottle, clock,
        globe, window, window shade, cat, sewing machine, typewriter, screwdriver, dresser, potted plant
    couch, chair, table, television, remote control, speaker, radio, cassette player, cd player, projector,
        lamp, pillow, blanket, rug, curtain, window, window shade, door, fireplace, heater, radiator, bookshelf,
        book, cabinet, dresser, wardrobe, chest, bed, vase, potted plant, flower, clock, fan, piano, guitar,
        cat, dog, candle, telephone, cell phone, ceiling, light switch, laptop, monitor, desk, cup, teddy bear,
        doll, basket, doormat, stove, handkerchief, diaper, sock
    bed, crib, pillow, blanket, lamp, wardrobe, dresser, curtain, window, window shade, rug, mosquito net,
        teddy bear, doll, pajamas, diaper, baby bottle, bib, bottle, sleeping bag, backpack, t-shirt,
        sweatshirt, book
    stove, fridge, microwave, dishwasher, washing machine, toaster, slow cooker, sink, cabinet, dish rack, pot,
        frying pan, wok, kettle, teapot, coffee pot, coffee maker, waffle iron, rotisserie, spatula, ladle,
        spoon, fork, knife, strainer, bowl, measuring cup, plate, cup, jug, pitcher, bottle, bottle cap,
        drinking glass, wine glass, can opener, corkscrew, salt shaker, pepper grinder, mortar and pestle, tray,
        table, paper towels, towel, cloth, apron, soap dispenser, window, broom, mop, bucket, trash can, magnet,
        cat, vending machine
    plate, bowl, cup, fork, knife, spoon, spatula, ladle, strainer, drinking glass, wine glass, cocktail shaker,
        bottle, jug, pitcher, vase, teapot, coffee pot, coffee maker, tray, table, chair, candle, restaurant,
        bakery, patio, menu, flower, salt shaker, pepper grinder, stove, microwave, frying pan, wok, pot,
        slow cooker, mortar and pestle, beer, wine, coffee, drink, almond, bagel, birthday cake, bread, burrito,
        cake, candy, cheese, chocolate, cookie, croissant, cupcake, dessert, dough, doughnut, egg, french fries,
        ginger, guacamole, hamburger, hot dog, ice cream, mashed potatoes, meatloaf, pasta, pecan, pie, pizza,
        popsicle, pretzel, pudding, roast turkey, sandwich, soup, taco, waffle, walnut, strawberry, banana,
        apple, orange, lemon, lime, pineapple, grapes, blueberry, raspberry, cherry, berry, avocado, tomato,
        broccoli, cabbage, carrot, cauliflower, chili pepper, corn, cucumber, garlic, lettuce, mushroom, onion,
        pepper, potato, squash, zucchini, artichoke, eggplant, lobster, crab, crayfish, shrimp, fish, chicken,
        bakery, box, plastic bag
    apple, apricot, avocado, banana, berry, blueberry, cherry, coconut, custard apple, fig, grapes, jackfruit,
        kiwi, lemon, lime, mango, orange, peach, pear, pineapple, plum, pomegranate, raspberry, strawberry,
        watermelon, artichoke, broccoli, cabbage, carrot, cauliflower, chili pepper, corn, cucumber, eggplant,
        garlic, ginger, lettuce, mushroom, onion, pepper, potato, pumpkin, squash, tomato, zucchini, store,
        basket, crate, box, package, plastic bag, plate, bowl, knife, scale, wine glass, leaf, tree, pig
    wine, beer, drink, wine glass, drinking glass, bottle, bottle cap, corkscrew, can opener, cocktail shaker,
        jug, pitcher, barrel, crate, restaurant, table, candle, store, fridge
    toilet, sink, bathtub, curtain, towel, cloth, toilet paper, paper towels, soap dispenser, lotion, sunscreen,
        perfume, hairspray, makeup, lipstick, toothbrush, hair dryer, hair clip, shower cap, plunger, cabinet,
        window, window shade, door, trash can, bucket, rubber duck, cat, dog, rug, washing machine, bottle, mop,
        scale, box
    broom, mop, bucket, vacuum cleaner, washing machine, iron, clothes hanger, clothespin, cloth, towel,
        trash can, recycling bin, plastic bag, paintbrush, bookshelf
    backpack, bag, bikini, boot, bow tie, bra, buckle, button, cap, cloak, coat, cowboy hat, dress, feather boa,
        glasses, glove, hair clip, handbag, handkerchief, hat, high heel, holster, jacket, jeans, mask, mitten,
        necklace, pajamas, pants, poncho, robe, sandal, scarf, shirt, shoe, skirt, sneaker, sock, sombrero,
        stocking, suit, sunglasses, sweater, sweatshirt, swim trunks, swimsuit, t-shirt, tie, uniform, vest,
        wallet, watch, wig, umbrella, bench, chair, couch, cell phone, microphone, camera, clothes hanger,
        store, mustache, cloth, crutch, neck brace, hairspray, hair dryer, lipstick, makeup, plastic bag,
        doormat, wardrobe, curtain, pole, torch
    necklace, chain, watch, safety pin, gem, bottle cap, guitar pick, whistle, knot, button, hair clip, feather,
        padlock, hook, scale, stopwatch, clock, swing, fence, door, gate
    wool, scarf, hat, cap, mitten, glove, sock, sweater, poncho, cloth, blanket, mask, doormat, bag, teddy bear,
        basket, spindle, rug, dress, sweatshirt, cup, sheep
    stage, microphone, speaker, spotlight, curtain, chair, accordion, banjo, bassoon, cello, cymbal, drum,
        drum kit, drumstick, flute, french horn, gong, guitar, guitar pick, harmonica, harp, maraca, oboe,
        organ, pan flute, piano, saxophone, trombone, trumpet, violin, whistle, xylophone, dancer, suit, dress,
        cowboy hat, headphones, television, swimsuit, t-shirt, sunglasses, coat, jeans
    car, taxi, limousine, jeep, race car, van, camper, bus, truck, tow truck, fire truck, garbage truck,
        dump truck, ambulance, motorcycle, scooter, bicycle, rickshaw, cart, streetcar, train, traffic light,
        road sign, stop sign, pole, fence, wall, gate, house, store, restaurant, church, tower, statue,
        fountain, flag, bridge, parking meter, mailbox, trash can, bench, manhole cover, traffic cone, gas pump,
        telephone, atm, vending machine, clock, umbrella, dress, tree, plastic bag, mobile home, pier, pot,
        police officer
    wheel, car mirror, disc brake, seat belt, speedometer, airplane, ambulance, amphibious vehicle, bicycle,
        bulldozer, bus, camper, car, cart, cement truck, combine harvester, dump truck, fire truck, forklift,
        garbage truck, go-kart, golf cart, jeep, lawn mower, limousine, motorcycle, plow, race car, rickshaw,
        scooter, shopping cart, snowplow, streetcar, suitcase, tank, taxi, tow truck, tractor, train, train car,
        tricycle, truck, unicycle, van, wheelbarrow, wheelchair, cannon, box, helmet, pole, bird, dog,
        sunglasses, cd player
    church, monastery, mosque, temple, palace, castle, fort, tower, dome, roof, arch, bridge, wall, cross, bell,
        wind chime, altar, organ, ceiling, candle, throne, statue, pedestal, plaque, obelisk, fountain, flag,
        pole, clock, robe, gravestone, well, gate, house, lake, barn, cliff dwelling, rug, planetarium,
        restaurant, suit
    beach, lake, seawall, pier, dock, lighthouse, boathouse, bridge, dam, boat, sailboat, ship, canoe,
        submarine, shipwreck, oil rig, construction crane, anchor, paddle, cliff, palm tree, roof, house,
        castle, pole, bench, umbrella, chair, towel, bikini, bra, swimsuit, swim trunks, swim cap, sandal,
        skirt, jeans, hat, sombrero, sunglasses, bag, backpack, snorkel, scuba diver, volleyball, kite, seagull,
        pelican, duck, goose, swan, heron, sea lion, seal, turtle, shell, starfish, crab, dog, mountain, cloud,
        fish, flag, taxi, helmet, sneaker, fountain
    bridge, train, pier, blimp, seawall, dam
    coral, coral reef, sea anemone, clownfish, fish, goldfish, lionfish, pufferfish, eel, stingray, shark,
        whale, dolphin, turtle, snake, scuba diver, snorkel, swim cap, gas mask, oxygen mask, mask, starfish,
        sea urchin, sea cucumber, slug, snail, shell, crab, lobster, shrimp, jellyfish, octopus, seahorse,
        shipwreck, swim trunks
    fish, fishing reel, boat, hook, knife, bucket
    cow, bull, sheep, lamb, goat, horse, donkey, pig, chicken, rooster, chick, duck, goose, turkey, llama, dog,
        barn, house, roof, fence, gate, hay, field, tractor, combine harvester, farm machine, plow, cart,
        wheelbarrow, bucket, milk can, truck, scarecrow, windmill, water tower, tree, water buffalo, lawn mower,
        crate
    zebra, giraffe, elephant, antelope, gnu, lion, cheetah, leopard, hyena, hippo, rhino, ostrich,
        water buffalo, warthog, vulture, crane, stork, flamingo, monkey, tree, fence, field, bird, jeep
    fence, wall, kangaroo, toucan, parrot, bird, monkey, llama, camel, deer, bear, tiger, peacock, tree, pole,
        baseball player, tennis ball, bicycle, chair, padlock
    mountain, valley, cliff, lake, field, volcano, geyser, cave, tent, backpack, sleeping bag, pot, skis, sled,
        snowmobile, snowplow, helmet, mask, sunglasses, sweatshirt, snowman, snowflake, cabin, house, bicycle,
        goat, sheep, dog, bridge, dam, cloud, castle, cliff dwelling, wall, camper, parachute, wolf, bear, deer,
        bison
    potted plant, flower, daffodil, daisy, hibiscus, marigold, rose, sunflower, thistle, tulip, leaf, tree,
        cactus, clover, mushroom, berry, bee, wasp, fly, butterfly, moth, dragonfly, beetle, ladybug,
        grasshopper, cricket, cicada, mantis, stick insect, spider, spider web, ant, caterpillar, insect, tick,
        centipede, snail, slug, frog, lizard, snake, hummingbird, bird, squirrel, acorn, chestnut, fence,
        birdhouse, beehive, honeycomb, greenhouse, wheelbarrow, shovel, rake, lawn mower, fountain, statue,
        bench, patio, table, chair, umbrella, swing, cat, dog, house, roof, vase, pot, bucket, window shade,
        artichoke, cabbage
    axe, chainsaw, drill, hammer, hand plane, ladder, paintbrush, pliers, saw, screwdriver, shovel,
        tape measure, toolbox, wrench, nail, screw, hook, chain, padlock, bucket, ruler, pencil, box, crate,
        barrel, knot, glove, hard hat, bookshelf, desk, van, wheelbarrow, jeans
    pen, pencil, marker, eraser, ruler, pencil case, pencil sharpener, scissors, letter opener, envelope, book,
        binder, backpack, handbag, paintbrush, desk, table, abacus, calculator, magnifying glass, globe,
        compass, hammer
    crib, teddy bear, doll, diaper, baby bottle, bib, blanket, pajamas, balloon, puzzle, rubber duck, swing,
        kite, pinwheel, tricycle, gift, chair, graduation cap
    baseball player, baseball, football helmet, helmet, cap, glove, football, rugby ball, soccer ball,
        basketball, volleyball, tennis racket, tennis ball, knee pad, scoreboard, hockey puck, trophy, whistle,
        stopwatch, flag, fence, t-shirt, sneaker, sock, bench
    barbell, dumbbell, punching bag, boxing glove, bench, sneaker, gymnast, swimsuit, swing, t-shirt
    swim cap, swimsuit, swim trunks, bikini, snorkel, scuba diver, shower cap
    croquet ball, golf ball, golf cart, suit, hammer
    uniform, gun, helmet, vest, holster, tank, truck, van, jeep, amphibious vehicle, cannon, missile, gas mask,
        oxygen mask, stretcher, tripod, binoculars, knee pad, sword, backpack, helicopter, fighter jet,
        airplane, ship, submarine, parachute, police officer, tent, flag, bullet, bomb, shield, radio, boot,
        muzzle, buckle, hat, book, bikini, dog
    armor, shield, sword, helmet, knight helmet, axe, gun, bow and arrow, horse, flag, castle, tent, vest,
        cloak, knife
    cowboy hat, boot, jeans, gun, holster, horse, banjo, guitar, axe, pool table, vest, shirt
    bicycle, unicycle, tricycle, motorcycle, scooter, go-kart, snowmobile, helmet, knee pad, disc brake, wheel,
        bottle, backpack, sunglasses, jeep, suit
    canoe, boat, paddle, lake, bikini, beach, helmet
    groom, dress, suit, tie, bow tie, flower, rose, church, altar, cake, bench, wine glass, limousine, hat, wig
    robe, graduation cap, suit, tie, dress, stage, cloak, kimono, throne, altar, umbrella, pajamas
    stethoscope, syringe, bandage, stretcher, coat, doctor, nurse, oxygen mask, wheelchair, crutch, neck brace,
        bed, thermometer, mask, gas mask, glasses, glove, sweatshirt, uniform, helmet, vest, t-shirt, bottle
    beaker, petri dish, measuring cup, microscope, bottle, coat, scientist, oscilloscope, syringe, computer,
        glove, plastic bag, jug, cup, bowl
    camera, lens cap, tripod, backpack, binoculars, bag, spotlight, telescope, umbrella, curtain
    spotlight, lamp, bookshelf, chair, coat
    cassette, cassette player, cd player, radio, speaker, ipod, disc, headphones, television, bookshelf
    airplane, airplane wing, fighter jet, helicopter, parachute, hot air balloon, blimp, space shuttle, rocket,
        missile, cloud, bird, mountain, flag, sun, satellite, truck
    train, train car, streetcar, bridge, fence, pole, door, traffic light, house, bench, clock, bus, chair
    construction crane, hard hat, truck, bulldozer, forklift, ladder, cement mixer, cement truck, bridge, tower,
        hook, chain, dump truck, crate, fence, pole, ship, dock, oil rig, scoreboard
    carousel, ferris wheel, swing, balloon, horse, circus tent, light bulb
    christmas tree, ornament, gift, wreath, stocking, santa claus, santa hat, elf hat, candle, candy cane, star,
        bow, fireplace, holly, bell, light bulb, reindeer, menorah, teddy bear, snowman, leaf
    jack-o-lantern, pumpkin, ghost, mask, wizard hat, candle, skull
    library, bookshelf, book, comic book, store, table, chair, desk, computer, lamp, window
    barbershop, chair, hair dryer, hairspray, scissors, mustache, store
    bakery, bread, bagel, pretzel, croissant, cake, pie, cookie, chocolate, tray, basket, store
""")

# Seen with much that none of the groups can name.
COMPANIONS = noun_stars("""
    dog: tennis ball, soccer ball, football, baseball, muzzle, fence, sled, seat belt, sunglasses,
        graduation cap, cowboy hat, hat, coat, t-shirt, sweater, scarf, poncho, vest, wig, hair dryer,
        toilet paper, paper towels, bench, cup, plate, bowl, popsicle, basket, bucket, box, hay, beach, field,
        keyboard, laptop, remote control, car, shoe, sock, boat, swimsuit, towel, bed, doormat, skis, rabbit,
        cat, hamster, pillow
    cat: box, toilet paper, paper towels, laptop, keyboard, monitor, basket, sleeping bag, doormat,
        washing machine, suitcase, shoe, toilet, bird, mouse, fish, hat
    rabbit: box, basket, measuring cup, hay, cabbage, carrot, lettuce
    hamster: cup, box, mousetrap, wheel, hay
    squirrel: trash can, tree, acorn, walnut, birdhouse, fence
    store: apple, banana, lemon, orange, strawberry, pineapple, cucumber, zucchini, pepper, squash, cabbage,
        broccoli, cauliflower, package, plastic bag, basket, shopping cart, crate, bottle, book, comic book,
        bookshelf, teddy bear, doll, shoe, sneaker, boot, sandal, hat, cowboy hat, coat, jeans, dress, bag,
        knife, meatloaf, chocolate, candy, bread, pig, fish, desk, vending machine, road sign, sunglasses,
        umbrella, flower
    toilet paper: plastic bag, hand plane
    ruler: spider, hook, fish, magnifying glass, hand plane, leaf
    horse: cart, helmet, boot
    cart: cow, water buffalo, donkey, dog
    drum: pan flute, flute, uniform
    tray: package, plastic bag
    comic book: package, mask, t-shirt
    bridge: lake, mountain, valley
    turtle: beach, lake
    torch: t-shirt, sneaker, statue
    lamp: vase, clock, fan
    hat: gun, trumpet, wool
    mushroom: coral reef, tree, leaf, slug, field
    mobile home: car, flag
    slug: mushroom, leaf
    neck brace: sunglasses, cell phone
    package: drink, box, bottle
    plaque: pedestal, suit
    spiral: railing, shell
    microphone: harmonica, computer
    hand plane: ruler
""")

# In the background of any photograph, or worn by anyone in it; and shapes, which many things have.
(ANYWHERE,) = noun_groups("""
    man, doctor, nurse, dancer, scientist, eye, tooth, hat, cap, shirt, t-shirt, jeans, pants, jacket, shoe, sneaker,
        glasses, sunglasses, tree, leaf, flower, field, cloud, house, wall, fence, pole, door, window, chair, table,
        circle, oval, square, rectangle, triangle, diamond, heart, star, spiral
""")

_TOGETHER = linked(TOGETHER, COMPANIONS)


def may_show(noun: str, other: str) -> bool:
    """Whether a photograph whose main thing is a `noun` may also show what can be called `other`."""
    return same_thing(noun, other) or other in ANYWHERE or other in _TOGETHER.get(noun, frozenset())
