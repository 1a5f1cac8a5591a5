#compdef metarun
# Completion of metarun in zsh.
#   eval "$(metarun completion zsh)"      in this shell; in ~/.zshrc for all

_metarun() {
    local program=${(Q)words[1]/#\~/$HOME} line
    local -a finished unfinished
    while IFS= read -r line; do
        case $line in  # "finished?<tab>candidate:meaning"; nothing is added behind a "key="
            (1$'\t'*) finished+=("${line#*$'\t'}") ;;
            (0$'\t'*) unfinished+=("${line#*$'\t'}") ;;
        esac
    done < <("$program" completion candidates zsh "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)
    _describe 'metarun' finished -- unfinished -S ''
}

if [[ $funcstack[1] == _metarun ]]; then  # loaded from a folder of $fpath, as a file _metarun
    _metarun "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _metarun metarun
fi
