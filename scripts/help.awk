# What `make` prints: the commands of the Makefile by stage, their variables with the defaults of
# env.sh, an example each.
#
#   awk -f scripts/help.awk env.sh Makefile

function with_default(word,    comma) {
    comma = sub(/,$/, "", word) ? "," : ""
    return word (word in defaults && defaults[word] != "" ? "=" defaults[word] : "") comma
}

match($0, /^: "\$\{[A-Za-z0-9_]+:=.*\}"$/) { # : "${NAME:=default}"
    split(substr($0, 6), part, ":=")
    defaults[part[1]] = substr($0, 8 + length(part[1]), length($0) - length(part[1]) - 9)
}
/^##@ / { print "\n" substr($0, 5) }
/^[a-z-]+: +## / {
    target = text = $0
    sub(/:.*/, "", target)
    sub(/^[a-z-]+: +## /, "", text)
    printf "  make %-14s%s\n", target, text
}
/^#: / {
    line = ""
    for (i = 2; i <= NF; i++) line = line " " with_default($i)
    print "                    " line
}
/^#> / { print "                     e.g. " substr($0, 4) }
END {
    print "\nNAME=value is the default, a NAME alone has no default or is detected; env.sh explains each variable.\n" \
        "ARGS=\"settings\" are settings of the recipe, ARGS=\"training.lr=2e-5\" (docs/settings.md);\n" \
        "ARGS=\"options\" are more options of the command, which ARGS=--help lists.\n" \
        "`bash scripts/X.sh --help` explains command X."
}
