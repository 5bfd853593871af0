# Names the known variable that is nearest to each unknown one, for the Makefile.
#
#   awk -v unknown='CONFIGS' -v known='CONFIG DCP HF' -f scripts/nearest.awk

function least(a, b, c) {
    return a < b ? (a < c ? a : c) : (b < c ? b : c)
}

function distance(a, b,    i, j, d) { # edits that turn one word into the other
    for (j = 0; j <= length(b); j++) d[0, j] = j
    for (i = 1; i <= length(a); i++) {
        d[i, 0] = i
        for (j = 1; j <= length(b); j++)
            d[i, j] = least(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (substr(a, i, 1) != substr(b, j, 1)))
    }
    return d[length(a), length(b)]
}

function advice(name,    i, far, nearest) {
    if (name ~ /\./) return name " is not a variable: settings go into ARGS=\"" name "=…\""
    for (i = 1; i <= count; i++) {
        far = distance(toupper(name), names[i])
        if (nearest == "" || far < shortest) {
            nearest = names[i]
            shortest = far
        }
    }
    return name " is a variable that no command reads; the nearest is " nearest
}

BEGIN {
    count = split(known, names)
    for (k = 1; k <= split(unknown, words); k++) all = all (k > 1 ? "; " : "") advice(words[k])
    print all " (`make` lists them; what is meant for the programs goes before make: NAME=value make …)"
}
