// Command plot draws what bench growth measured, one SVG file for each curve:
//
//	go -C bench/plot run . growth.json ../../docs
//
// It is a module of its own, so that what draws pictures is not among what the
// server depends on.
package main

import (
	"encoding/json"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// A report is what is drawn of the report of bench growth.
type report struct {
	Curves []curve
}

type curve struct {
	Name, X, Y string
	Points     []point
}

type point struct {
	X      float64
	Median float64   `json:"median_us"`
	Runs   []float64 `json:"runs_us"`
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: plot growth.json directory")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func run(file, dir string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var rep report
	if err := json.Unmarshal(text, &rep); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, c := range rep.Curves {
		p, err := c.plot()
		if err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
		if err := p.Save(14*vg.Centimeter, 8*vg.Centimeter, filepath.Join(dir, "growth-"+c.Name+".svg")); err != nil {
			return err
		}
	}
	return nil
}

// plot draws the medians as a line and the single runs as dots. Each x has the
// same distance to the next: from 0 to 10,000 no scale would show them all.
func (c *curve) plot() (*plot.Plot, error) {
	plot.DefaultFont.Variant = "Sans"
	p := plot.New()
	p.BackgroundColor = color.White         // a page may be dark
	p.X.Label.Text, p.Title.Text = c.X, c.Y // beside the axis there is not enough room
	p.Add(plotter.NewGrid())

	var medians, runs plotter.XYs
	var names []string
	most := 0.0
	for i, pt := range c.Points {
		medians = append(medians, plotter.XY{X: float64(i), Y: pt.Median})
		for _, run := range pt.Runs {
			runs = append(runs, plotter.XY{X: float64(i), Y: run})
			most = max(most, run)
		}
		names = append(names, strconv.FormatFloat(pt.X, 'f', -1, 64))
	}
	line, dots, err := lines(medians, runs)
	if err != nil {
		return nil, err
	}
	p.Add(line, dots)
	p.Legend.Add("median", line)
	p.Legend.Add("single runs", dots)
	p.NominalX(names...)
	p.X.Min, p.X.Max = -.3, float64(len(names))-.7 // room for the names
	p.Y.Min, p.Y.Max = 0, most*1.3                 // from 0, or noise looks like growth
	p.Legend.Top = true
	return p, nil
}

func lines(medians, runs plotter.XYs) (*plotter.Line, *plotter.Scatter, error) {
	line, err := plotter.NewLine(medians)
	if err != nil {
		return nil, nil, err
	}
	line.Color, line.Width = color.RGBA{R: 0x1f, G: 0x77, B: 0xb4, A: 0xff}, vg.Points(1.5)
	dots, err := plotter.NewScatter(runs)
	if err != nil {
		return nil, nil, err
	}
	dots.Shape, dots.Color, dots.Radius = draw.CircleGlyph{}, color.Gray{Y: 0x80}, vg.Points(2)
	return line, dots, nil
}
