package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// commandLine is what systemd makes of a unit's ExecStart=: the words without the program, variables put in their places. Of each it says where it
// comes from.
func (n *Node) commandLine(unit *Unit) ([]word, error) {
	variables, err := n.environment(unit)
	if err != nil {
		return nil, err
	}
	var words []word
	for i, text := range unit.Exec {
		if i == 0 {
			continue
		}
		// systemd.service(5): $A as a word of its own stands for any number of words, ${A} in a word for its text; $$ is a dollar sign.
		if name, ok := strings.CutPrefix(text, "$"); ok && name != "" && name[0] != '{' && name[0] != '$' {
			v := variables[name]
			for _, part := range split(v.text) {
				words = append(words, word{part, v.source})
			}
			continue
		}
		words = append(words, replace(text, variables))
	}
	return words, nil
}

// replace puts variables in the places of ${NAME}.
func replace(text string, variables map[string]word) word {
	w := word{source: "ExecStart= of " + Service}
	for text != "" {
		before, rest, found := strings.Cut(text, "$")
		w.text += before
		if !found {
			break
		}
		text = rest
		if strings.HasPrefix(text, "$") {
			w.text, text = w.text+"$", text[1:]
			continue
		}
		name, after, ok := strings.Cut(strings.TrimPrefix(text, "{"), "}")
		if !strings.HasPrefix(text, "{") || !ok {
			w.text += "$"
			continue
		}
		if v, ok := variables[name]; ok {
			w.text, w.source = w.text+v.text, v.source
		}
		text = after
	}
	return w
}

// environment is what the variables of a unit are. Files win over Environment=, and later ones over earlier ones.
func (n *Node) environment(unit *Unit) (map[string]word, error) {
	variables := map[string]word{}
	for _, assignment := range unit.Environment {
		name, value, _ := strings.Cut(assignment, "=")
		variables[name] = word{value, "Environment=" + name + " of " + Service}
	}
	for _, file := range unit.EnvironmentFiles {
		paths, err := filepath.Glob(n.path(file.Path))
		if err != nil {
			return nil, fmt.Errorf("read EnvironmentFile=%s: %w", file.Path, err)
		}
		if len(paths) == 0 && !file.Optional {
			return nil, fmt.Errorf("read EnvironmentFile=%s of %s: %w", file.Path, Service, fs.ErrNotExist)
		}
		for _, path := range paths {
			content, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) && file.Optional {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("read EnvironmentFile= of %s: %w", Service, err)
			}
			source := "/" + strings.TrimPrefix(strings.TrimPrefix(path, n.Root), "/")
			for _, v := range parseEnvironment(string(content)) {
				variables[v.name] = word{v.value, source}
			}
		}
	}
	return variables, nil
}

type variable struct{ name, value string }

// parseEnvironment reads a file as systemd does, see parse_env_file_internal in src/basic/env-file.c, version 254 and later: NAME=value on a line,
// parts in single or double quotes, a backslash before what is to lose its meaning and at the end of a line that goes on, comments by # or ;.
func parseEnvironment(content string) (found []variable) {
	const newline, space = "\n\r", " \t\n\r"
	for content != "" {
		content = strings.TrimLeft(content, space)
		if content == "" {
			break
		}
		if content[0] == '#' || content[0] == ';' {
			_, content = line(content)
			continue
		}
		end := strings.IndexAny(content, "="+newline)
		if end < 0 {
			break
		}
		name := strings.TrimRight(content[:end], space)
		if content[end] != '=' {
			content = content[end:] // a line that assigns nothing
			continue
		}
		var value string
		value, content = parseValue(content[end+1:])
		found = append(found, variable{name, value})
	}
	return found
}

func line(text string) (line, rest string) {
	if end := strings.IndexAny(text, "\n\r"); end >= 0 {
		return text[:end], text[end+1:]
	}
	return text, ""
}

// parseValue reads a value up to the end of its line, and returns what follows.
func parseValue(text string) (value, rest string) {
	var b strings.Builder
	var quote byte
	plain := false // in a part without quotes, from which blanks at the end go
	keep := 0      // length of what is not such a blank
	for i := 0; i < len(text); i++ {
		c := text[i]
		blank := c == ' ' || c == '\t'
		switch {
		case quote == 0 && (c == '\n' || c == '\r'):
			return b.String()[:keep], text[i+1:]
		case quote == 0 && !plain && (c == '\'' || c == '"'):
			quote = c
		case quote != 0 && c == quote:
			quote = 0
		case quote == '\'':
			b.WriteByte(c)
			keep = b.Len()
		case c == '\\' && i+1 < len(text):
			i++
			if quote == 0 {
				plain = true
			}
			if text[i] == '\n' {
				break
			}
			if quote == '"' && !strings.ContainsRune("\"\\`$", rune(text[i])) {
				b.WriteByte('\\')
			}
			b.WriteByte(text[i])
			keep = b.Len()
		case quote == 0 && !plain && blank:
		default:
			b.WriteByte(c)
			if quote == 0 {
				plain = true
			}
			if quote != 0 || !blank {
				keep = b.Len()
			}
		}
	}
	return b.String()[:keep], ""
}

// split divides the value of a variable into words, at blanks outside of quotes.
func split(text string) (words []string) {
	var b strings.Builder
	var quote rune
	inWord, escaped := false, false
	for _, c := range text {
		switch {
		case escaped:
			b.WriteRune(c)
			escaped = false
		case c == '\\':
			escaped, inWord = true, true
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote, inWord = c, true
		case quote == 0 && strings.ContainsRune(" \t\n\r", c):
			if inWord {
				words = append(words, b.String())
			}
			b.Reset()
			inWord = false
		default:
			b.WriteRune(c)
			inWord = true
		}
	}
	if inWord {
		words = append(words, b.String())
	}
	return words
}
