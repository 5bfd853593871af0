# Names the variables given to make that its commands do not read, for the Makefile: `make finetune
# DATA=mine.json` would train the recipe's own data.
#
#   awk -v goals='finetune' -v given='DATA ARGS' -f scripts/unread.awk env.sh Makefile
#
# A command reads what its line `#:` in the Makefile lists, and ARGS. Variables of the machine and of
# a cluster may be given to all: they say how something runs, and not on what.

BEGIN {
    split("CONFIG DRY_RUN", own)
    for (i in own) decides[own[i]]
    for (i = split(goals, words); i > 0; i--) is_goal[words[i]]
}
/^# ── / { is_first = /Models and data/ }
is_first && match($0, /^: "\$\{[A-Za-z0-9_]+/) { decides[substr($0, 6, RLENGTH - 5)] }
/^[a-z-]+: *## / { command = substr($0, 1, index($0, ":") - 1) }
/^#: / {
    sub(/^#: as for finetune/, "#: CONFIG DRY_RUN")
    for (i = 2; i <= NF; i++)
        if (match($i, /^[A-Z_]+/)) {
            name = substr($i, 1, RLENGTH)
            somewhere[name]
            if (command in is_goal) is_read[name]
        }
}
END {
    for (i = 1; i <= split(given, names); i++)
        if (names[i] in decides && names[i] in somewhere && !(names[i] in is_read)) all = all (all == "" ? "" : ", ") names[i]
    if (goals != "" && all != "")
        print "make " goals " reads no " all ": leave it out (`make` lists what each command reads; settings of a recipe go into ARGS=\"a.b=c\")"
}
